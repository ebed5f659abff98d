"""The table of transitions that `next-layer-router` follows, as a file in a predictor's directory."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np
from jaxtyping import Float

from emoe_jax.errors import ConfigError

TRANSITIONS_FILE = "transitions.npz"
"""Its name in a predictor's directory."""
_TOLERANCE = 0.01
"""Of a row's sum; half precision keeps three digits."""


def save_transitions(path: str | Path, transitions: Float[np.ndarray, "M1 E E"]) -> None:
    """Write the table in half precision (see `NextLayerRouter`)."""
    with Path(path).open("wb") as file:
        np.savez_compressed(file, transitions=transitions.astype(np.float16))


def load_transitions(path: str | Path, num_layers: int, num_experts: int, top_k: int) -> Float[np.ndarray, "M1 E E"]:
    """Raises `ConfigError`, one line, where the file is missing, damaged or of another model."""
    try:
        with Path(path).open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("it is a single array")
            table = archive["transitions"]
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; it should hold transitions between experts") from None
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise ConfigError(f"{path} holds no transitions between experts: {' '.join(str(error).split())}") from None
    if table.dtype != np.float16:
        raise ConfigError(f"{path} holds transitions of type {table.dtype}; they are written as float16")
    expected = (num_layers - 1, num_experts, num_experts)
    if table.shape != expected:
        raise ConfigError(
            f"{path} holds transitions of shape {list(table.shape)}; the model has {num_layers} MoE layers of "
            f"{num_experts} experts, which makes {list(expected)}"
        )
    table = table.astype(np.float32)
    if not (np.isfinite(table).all() and (table >= 0).all() and (table <= 1 + _TOLERANCE).all()):
        raise ConfigError(f"{path} holds transitions that are no shares between 0 and 1")
    sums = table.sum(-1)
    if sums.size and np.abs(sums - top_k).max() > _TOLERANCE * top_k:
        raise ConfigError(
            f"{path} holds transitions to {sums.min():.3g} to {sums.max():.3g} experts of the next layer; the model "
            f"chooses {top_k}"
        )
    return table
