"""Eight-bit weights: symmetric, rounded to nearest, with one scale per output channel. Host arithmetic in NumPy."""

import numpy as np
from jaxtyping import Float, Int8

MOST = 127
"""The largest number of a quantised weight. -128 is not used, so that the range is symmetric."""

_CHUNK = 1 << 18
"""Numbers that are rounded in one go: their copies stay in the cache."""


def quantised(
    weights: Float[np.ndarray, "... O I"],
) -> tuple[Int8[np.ndarray, "... O I"], Float[np.ndarray, "... O"]]:
    """`quantise_into` with new arrays."""
    numbers, scales = np.empty(weights.shape, np.int8), np.empty(weights.shape[:-1], np.float32)
    rows = weights.reshape(-1, weights.shape[-1])
    quantise_into(rows, numbers.reshape(rows.shape), scales.reshape(-1))
    return numbers, scales


def quantise_into(
    weights: Float[np.ndarray, "O I"], numbers: Int8[np.ndarray, "O I"], scales: Float[np.ndarray, " O"]
) -> None:
    """Fill `numbers` and float32 `scales` such that `numbers * scales[:, None]` is within half a scale of the weights.

    A channel's scale is its largest magnitude over 127. A channel of zeros has the scale 0. Weights must be finite.

    Worked example: [2.54, -1, 0] has the scale 0.02 and the numbers [127, -50, 0].
    """
    step = max(1, _CHUNK // max(1, weights.shape[1]))
    for first in range(0, len(weights), step):
        rows = weights[first : first + step].astype(np.float32)
        largest = np.abs(rows).max(axis=1, initial=0)
        scale = largest / np.float32(MOST)
        # Where the scale is rounded to zero, or near it, so are the weights.
        rows /= np.where(scale > 0, scale, 1)[:, None]
        np.rint(rows, out=rows)
        numbers[first : first + step] = np.clip(rows, -MOST, MOST, out=rows)
        scales[first : first + step] = scale


def dequantise_into(
    numbers: Int8[np.ndarray, "O I"], scales: Float[np.ndarray, " O"], weights: Float[np.ndarray, "O I"]
) -> None:
    """Fill `weights` with `numbers * scales[:, None]`, computed in float32."""
    step = max(1, _CHUNK // max(1, weights.shape[1]))
    for first in range(0, len(weights), step):
        rows = slice(first, first + step)
        np.copyto(weights[rows], numbers[rows] * scales[rows, None], casting="unsafe")
