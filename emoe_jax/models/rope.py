"""Rotary position embedding in both orders of pairs, with the scaling rules of current checkpoints."""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from emoe_jax.config import ModelConfig, RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Angle per position of each pair that is rotated, float32, after the scaling rule: at most `H / 2`."""
    head_dim = rope.rotated(head_dim)
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / head_dim
    base = 1.0 / (rope.theta**exponents)
    match rope.kind:
        case "default":
            return base.astype(np.float32)
        case "linear":
            return (base / rope.factor).astype(np.float32)
        case "llama3":
            return _llama3(rope, base).astype(np.float32)
        case "yarn":
            return _yarn(rope, base, head_dim).astype(np.float32)


def _llama3(rope: RopeConfig, base: np.ndarray) -> np.ndarray:
    """Llama 3.1: long wavelengths divided by `factor`, short ones kept, a linear blend between."""
    wavelength = 2 * math.pi / base
    longest_kept = rope.original_max_position / rope.high_freq_factor
    shortest_scaled = rope.original_max_position / rope.low_freq_factor
    blend = (rope.original_max_position / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    blended = (1 - blend) * base / rope.factor + blend * base
    scaled = np.where(wavelength > shortest_scaled, base / rope.factor, base)
    return np.where((wavelength >= longest_kept) & (wavelength <= shortest_scaled), blended, scaled)


def _yarn(rope: RopeConfig, base: np.ndarray, head_dim: int) -> np.ndarray:
    """YaRN (Peng et al. 2023): interpolate slow pairs, keep fast ones, a ramp between two correction dimensions."""

    def correction_dim(rotations: float) -> float:
        turns = rope.original_max_position / (rotations * 2 * math.pi)
        return head_dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = correction_dim(rope.beta_fast), correction_dim(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    keep = 1 - ramp
    return base / rope.factor * (1 - keep) + base * keep


class Rotation(NamedTuple):
    """How heads are rotated to their positions: the same in every layer, so a step computes it once. In float32."""

    cos: Float[Array, "B T n"]
    sin: Float[Array, "B T n"]

    @classmethod
    def of(cls, positions: Int[Array, "B T"], config: ModelConfig) -> "Rotation":
        """Of a model's `n` frequencies at these positions."""
        frequencies = inverse_frequencies(config.rope, config.rope_dim)
        angles = positions[..., None].astype(jnp.float32) * frequencies[None, None, :]
        factor = config.rope.attention_factor
        return cls(jnp.cos(angles) * factor, jnp.sin(angles) * factor)


def rotate(
    x: Float[Array, "B T heads H"], rotation: Rotation, interleaved: bool = False
) -> Float[Array, "B T heads H"]:
    """Rotate every head of `x` to its position.

    Pairs are `(j, j + n)` for the `n` frequencies. What lies behind the first `2n` numbers of a head stays as it is.
    With `interleaved`, pairs are `(2j, 2j + 1)`; they come out as `(j, j + n)`, which no product of two heads notices.
    """
    cos, sin = (part[:, :, None, :].astype(x.dtype) for part in rotation)
    n = cos.shape[-1]
    parts = [x] if 2 * n == x.shape[-1] else jnp.split(x, [2 * n], axis=-1)
    rotated, rest = parts[0], parts[1:]
    if interleaved:
        pairs = rotated.reshape(*x.shape[:-1], n, 2)
        first, second = pairs[..., 0], pairs[..., 1]
    else:
        first, second = jnp.split(rotated, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, *rest], axis=-1)
