"""From the files of a checkpoint to a model of one of the families, and back."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from emoe_jax.checkpoint.checkpoint import Checkpoint
from emoe_jax.checkpoint.files import CONFIG, locate, read_json
from emoe_jax.checkpoint.save import Layout, write_checkpoint
from emoe_jax.checkpoint.tokenizer import Tokenizer
from emoe_jax.config import ModelConfig
from emoe_jax.errors import CheckpointError
from emoe_jax.experts.weights import ExpertWeights
from emoe_jax.models.decoder import Decoder
from emoe_jax.models.families import family_of
from emoe_jax.models.hf_keys import without_bookkeeping
from emoe_jax.progress import Progress


def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    """Translate a Hugging Face `config.json`. Raises `ConfigError` naming any option that is not supported."""
    return family_of(raw).config(raw)


def config_from_directory(directory: str | Path, quiet: bool = False) -> ModelConfig:
    """Read `config.json` of a checkpoint directory. Raises `CheckpointError` when it is missing or not JSON.

    `quiet` leaves out the warning of ignored keys, where the file is read for the second time.
    """
    path = Path(directory) / CONFIG
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; expected a Hugging Face checkpoint directory") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} holds a {type(raw).__name__}; expected a JSON object")
    return config_from_hf(without_bookkeeping(raw) if quiet else raw)


def open_checkpoint(
    source: str | Path,
    revision: str | None = None,
    router_capacity_factor: float | None = None,
    trace_ranks: int | None = None,
) -> Checkpoint:
    """Open a Hugging Face checkpoint directory, or a hub id (downloading safetensors, JSON and tokenizer files).

    Code that a checkpoint brings along (`auto_map`) is never run. `router_capacity_factor` switches on OpenMoE's
    token dropping (published value: 2.0). `trace_ranks` is of `ModelConfig`. Raises `CheckpointError` for files that
    are missing, malformed or do not fit the configuration, `ConfigError` for options that are not supported.
    """
    directory = locate(source, revision)
    config = config_from_directory(directory)
    raw = read_json(directory / CONFIG)
    changes: dict[str, Any] = {"trace_ranks": trace_ranks}
    if router_capacity_factor is not None:
        changes["router"] = dataclasses.replace(config.router, capacity_factor=router_capacity_factor)
    generation = directory / "generation_config.json"
    if generation.exists():
        changes |= _generation_changes(read_json(generation))
    return Checkpoint(directory, family_of(raw), config.replace(**changes), raw)


def load_dense(
    checkpoint: Checkpoint, dtype: str | np.dtype, progress: Progress | None = None
) -> tuple[nnx.GraphDef, nnx.State]:
    """Everything but the experts on the default device, as the split of a `Decoder` (`nnx.merge` joins it).

    Reads one tensor at a time, so host memory holds at most the largest of them.
    """
    abstract = nnx.eval_shape(lambda: Decoder(checkpoint.config, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(abstract)
    return graphdef, checkpoint.load_dense(state, dtype, progress)


def load_tokenizer(directory: str | Path, chat_template: str | Path | None = None) -> Tokenizer | None:
    """The tokenizer of a checkpoint directory (see `Tokenizer.load`), or None when it has no tokenizer files."""
    has_config = (Path(directory) / CONFIG).exists()
    return Tokenizer.load(
        directory, config_from_directory(directory, quiet=True) if has_config else None, chat_template
    )


def save_checkpoint(
    directory: str | Path,
    raw_config: Mapping[str, Any],
    decoder_state: nnx.State,
    experts: Sequence[ExpertWeights],
    layout: Layout = "per_expert",
    max_shard_bytes: int = 2 << 30,
) -> None:
    """Write a checkpoint of the family that `raw_config` (`config.json`) names; see `write_checkpoint`."""
    family, config = family_of(raw_config), config_from_hf(raw_config)
    write_checkpoint(directory, family, config, raw_config, decoder_state, experts, layout, max_shard_bytes)


def _generation_changes(raw: dict[str, Any]) -> dict[str, Any]:
    """End-of-text ids of `generation_config.json`, which take precedence over those of `config.json`."""
    ids = raw.get("eos_token_id")
    if ids is None:
        return {}
    ids = ids if isinstance(ids, list) else [ids]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise CheckpointError(f"generation_config.json: eos_token_id is {raw['eos_token_id']!r}; expected token ids")
    return {"eos_token_ids": tuple(ids)}
