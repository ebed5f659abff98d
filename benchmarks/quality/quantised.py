"""A checkpoint whose weights have been rounded to few bits and back: what weight-only quantisation does to answers.

Rounding is to nearest, symmetric. Eight bits have one scale for each output channel, four bits one for each group of 32
inputs of a channel. All matrices of the layers are rounded but the routers, as usual; embeddings and head are not.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from safetensors.numpy import save_file

from emoe_jax.checkpoint.safetensors import SafetensorsFile
from emoe_jax.errors import CheckpointError

GROUP = 32
_SCALE_BYTES = 2
WEIGHTS = "model.safetensors"


class Sizes(NamedTuple):
    """Bytes of the weights as they are, and as they would be kept."""

    before: int
    after: int
    experts_before: int
    experts_after: int


def round_trip(weight: Float[np.ndarray, "n d"], bits: int) -> Float[np.ndarray, "n d"]:
    """A matrix `[out, in]` rounded to `bits` bits and back."""
    out, columns = weight.shape
    group = columns if bits == 8 else GROUP
    if columns % group:
        raise CheckpointError(f"a matrix of {columns} inputs has no whole groups of {group}")
    most = 2 ** (bits - 1) - 1
    groups = weight.astype(np.float32).reshape(out, columns // group, group)
    scale = np.maximum(np.abs(groups).max(-1, keepdims=True), 1e-12) / most
    return (np.clip(np.round(groups / scale), -most, most) * scale).reshape(out, columns).astype(np.float32)


def quantise(model: Path, out: Path, bits: int) -> Sizes:
    """Copy the checkpoint directory to `out` with rounded weights, in float32. Sizes are of bfloat16 weights before.

    Raises `CheckpointError` where the weights are not in one file of two-dimensional matrices.
    """
    if not (model / WEIGHTS).exists():
        raise CheckpointError(f"{model} has no {WEIGHTS}; only checkpoints of one file can be rounded here")
    shutil.copytree(model, out, ignore=shutil.ignore_patterns(WEIGHTS), dirs_exist_ok=True)
    tensors: dict[str, Float[np.ndarray, ...]] = {}
    before = after = experts_before = experts_after = 0
    file = SafetensorsFile(model / WEIGHTS)
    for name in file.tensors:
        tensor = np.asarray(jnp.asarray(file.tensor(name)).astype(jnp.float32))
        size = kept = 2 * tensor.size
        if _is_rounded(name, tensor):
            tensor = round_trip(tensor, bits)
            scales = tensor.shape[0] * (1 if bits == 8 else tensor.shape[1] // GROUP)
            kept = tensor.size * bits // 8 + _SCALE_BYTES * scales
        tensors[name] = tensor
        before, after = before + size, after + kept
        if ".experts." in name:
            experts_before, experts_after = experts_before + size, experts_after + kept
    save_file(tensors, out / WEIGHTS)
    return Sizes(before, after, experts_before, experts_after)


def _is_rounded(name: str, tensor: Any) -> bool:
    router = name.endswith((".gate.weight", ".gate_weight", "router.weight"))
    return tensor.ndim == 2 and ".layers." in name and not router
