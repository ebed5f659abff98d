"""Weights in blocks with a scale each, as published checkpoints have them, made floats. Host arithmetic in NumPy."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

MXFP4_BLOCK = 32
"""Neighbours of a row that have a scale in common."""

MXFP4_NAN = 255
"""The scale that is not a number."""

FP8_BLOCK = 128
"""Rows, and columns, that have a scale in common. Blocks at the edges of a matrix are smaller."""

FP8 = np.dtype(jnp.float8_e4m3fn)
"""What the bytes are bits of."""

_FP8_NUMBERS = np.arange(256, dtype=np.uint8).view(FP8).astype(np.float32)

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Of numbers of four bits by their lower three (e2m1). The highest bit is the sign."""

_CHUNK = 1 << 18
"""Numbers that are made in one go: they stay in the cache."""


def _pairs() -> Float[np.ndarray, "256 2"]:
    """The two numbers of every byte: the one in its low half comes first."""
    numbers = np.array([*_MAGNITUDES, *(-magnitude for magnitude in _MAGNITUDES)], np.float32)
    byte = np.arange(256)
    return np.stack([numbers[byte & 15], numbers[byte >> 4]], axis=1)


_PAIRS = _pairs()


def dequantise_mxfp4_into(
    blocks: UInt8[np.ndarray, "O packed_I"],
    scales: UInt8[np.ndarray, "O scaled_I"],
    weights: Float[np.ndarray, "O I"],
) -> None:
    """Fill `weights` with the numbers of four bits times the scales of their blocks, computed in float32.

    Worked example: a block whose first byte is 0x5F and whose scale is 128 begins with -6 * 2 and 3 * 2.
    """
    columns = weights.shape[1]
    step = max(1, _CHUNK // max(1, columns))
    for first in range(0, len(weights), step):
        rows = slice(first, first + step)
        numbers = _PAIRS[blocks[rows]].reshape(-1, columns // MXFP4_BLOCK, MXFP4_BLOCK)
        scale = np.ldexp(np.float32(1), scales[rows].astype(np.int32) - 127)
        np.copyto(weights[rows], (numbers * scale[..., None]).reshape(-1, columns), casting="unsafe")


def dequantise_fp8_into(
    numbers: UInt8[np.ndarray, "O I"],
    scales: Float[np.ndarray, "scaled_O scaled_I"],
    weights: Float[np.ndarray, "O I"],
) -> None:
    """Fill `weights` with the numbers of eight bits (e4m3) times the scales of their blocks, computed in float32.

    Worked example: a byte of 0x38 is 1.0. In row 200 and column 100 it becomes `scales[1, 0]`.
    """
    columns = weights.shape[1]
    step = max(1, _CHUNK // max(1, columns))
    for first in range(0, len(weights), step):
        rows = np.arange(first, min(first + step, len(weights)))
        scale = np.repeat(scales[rows // FP8_BLOCK], FP8_BLOCK, axis=1)[:, :columns]
        np.copyto(weights[rows[0] : rows[-1] + 1], _FP8_NUMBERS[numbers[rows]] * scale, casting="unsafe")


def has_fp8_nan(numbers: UInt8[np.ndarray, "O I"]) -> bool:
    """Whether one of the numbers is not a number. There is no infinity."""
    return bool(np.any(numbers & 127 == 127))
