"""A tiny random model that reads the demo tasks, and rows made by hand."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from benchmarks.quality.scores import METRICS, RESAMPLES, Row
from benchmarks.quality.served import Cell
from emoe_jax.models import save_checkpoint
from serve.options import DEMO_MODEL
from tests.engines import TINY, random_model


def write_model(directory: Path) -> Path:
    """The tests' tiny Mixtral with the vocabulary, the tokenizer and the chat template of the demo."""
    tokenizer = json.loads((DEMO_MODEL / "tokenizer.json").read_text())
    vocab_size = len(tokenizer["model"]["vocab"])
    raw = TINY | {"vocab_size": vocab_size, "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 1}
    raw |= {"num_hidden_layers": 2}
    model, experts = random_model(raw)
    save_checkpoint(directory, raw, nnx.state(model), jax.tree.map(lambda leaf: leaf / 4, experts))
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(DEMO_MODEL / name, directory / name)
    return directory


def made_row(cell: Cell, task: str, **numbers: float) -> Row:
    """A row whose intervals reach 0.01 to both sides of its numbers."""
    spread = np.linspace(-0.01, 0.01, RESAMPLES)
    return Row(
        cell,
        task,
        8,
        dict.fromkeys(METRICS) | dict(numbers),
        {name: value + spread for name, value in numbers.items()},
    )
