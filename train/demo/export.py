"""From trained parameters to the bundled checkpoint, and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tokenizers import Tokenizer

from emoe_jax.config import ModelConfig
from emoe_jax.experts.record_format import RecordFormat
from emoe_jax.models import config_from_hf, load_dense, open_checkpoint, save_checkpoint
from train.demo import objective, tokenizer
from train.demo.objective import Parameters


def write(directory: Path, hf_config: dict[str, Any], parameters: Parameters, bpe: Tokenizer) -> None:
    """A Hugging Face checkpoint with bfloat16 weights, its tokenizer and generation defaults."""
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), parameters)
    model = objective.decoder(config_from_hf(hf_config), rounded.dense)
    tokenizer.save(bpe, directory, hf_config["max_position_embeddings"])
    generation = {
        "bos_token_id": hf_config["bos_token_id"],
        "eos_token_id": hf_config["eos_token_id"],
        "pad_token_id": hf_config["pad_token_id"],
        "do_sample": False,
    }
    (directory / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    save_checkpoint(directory, hf_config, nnx.state(model, nnx.Param), rounded.experts)


def read(directory: Path) -> tuple[ModelConfig, Parameters, Tokenizer]:
    """What a checkpoint ships, widened to float32. Raises `CheckpointError` or `ConfigError`."""
    checkpoint = open_checkpoint(directory)
    config = checkpoint.config
    _, state = load_dense(checkpoint, "float32")
    dense = {".".join(map(str, path)): variable[...] for path, variable in nnx.to_flat_state(state)}
    layers = []
    for layer in range(len(config.moe_layers)):
        record_format = RecordFormat.of(config, "float32")
        records = np.empty((config.num_experts, record_format.size), np.float32)
        for expert, record in enumerate(records):
            checkpoint.read_expert(layer, expert, record, record_format)
        views = [record_format.views(record) for record in records]
        layers.append(record_format.weights(map(np.stack, zip(*views, strict=True))))
    return config, Parameters(dense, tuple(layers)), Tokenizer.from_file(str(directory / "tokenizer.json"))
