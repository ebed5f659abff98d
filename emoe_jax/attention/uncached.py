"""Attention of sequences to themselves, without a cache."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from emoe_jax.attention.sums import AttentionSums, attention_mask
from emoe_jax.config import ModelConfig
from emoe_jax.models.decoder import AttendFunction

BLOCK = 512
"""Queries and keys that are attended to at once."""


def causal_attend(config: ModelConfig, window: int | None, positions: Int[Array, "B T"]) -> AttendFunction:
    """Attention of sequences to themselves, without a cache."""
    scale = config.attention_scale
    return lambda q, k, v, sinks: (attend_causally(q, k, v, positions, window, scale, sinks), None)


def attend_causally(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K Hv"],
    positions: Int[Array, "B T"],
    window: int | None,
    scale: float,
    sinks: Float[Array, " N"] | None = None,
) -> Float[Array, "B T N Hv"]:
    """Sequences of equal positions attend to themselves. Scores exist for `BLOCK` queries and keys at a time."""
    T = q.shape[1]
    if T <= BLOCK:
        return attend(q, k, v, attention_mask(positions, positions[0], window), scale, sinks)
    number = -(-T // BLOCK)
    padding = ((0, 0), (0, number * BLOCK - T))
    q, k, v = (jnp.pad(x, (*padding, (0, 0), (0, 0))) for x in (q, k, v))
    positions = jnp.pad(positions, padding, constant_values=jnp.iinfo(jnp.int32).max)  # after all, so seen by none

    def part(x: Array, index: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(x, index * BLOCK, BLOCK, axis=1)

    def attended(row: Array) -> Array:
        queries, at = part(q, row), part(positions, row)

        def add(index: Array, sums: AttentionSums) -> AttentionSums:
            mask = attention_mask(at, part(positions, index)[0], window)
            return sums.add(queries, part(k, index), part(v, index), mask, scale)

        sums = jax.lax.fori_loop(0, number, add, AttentionSums.zero(queries, k.shape[2], v.shape[3]))
        return sums.output(q.dtype, sinks)

    blocks = jax.lax.map(attended, jnp.arange(number, dtype=jnp.int32))
    return jnp.moveaxis(blocks, 0, 1).reshape(*q.shape[:3], -1)[:, :T]


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    mask: Bool[Array, "B T S"],
    scale: float,
    sinks: Float[Array, " N"] | None = None,
) -> Float[Array, "B T N Hv"]:
    """Softmax attention in float32 over all keys at once."""
    return AttentionSums.zero(q, k.shape[2], v.shape[3]).add(q, k, v, mask, scale).output(q.dtype, sinks)
