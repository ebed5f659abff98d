"""The paged KV cache on the device: pages per layer, written and attended through block tables."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from emoe_jax.config import ModelConfig
from emoe_jax.models.attention import attend, attention_mask
from emoe_jax.models.decoder import AttendFunction

PAGE_SIZE = 16
"""Tokens per page."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerKV:
    """Keys (rotated) and values of one layer. Page 0 is the trash page: padded rows write there."""

    k: Float[Array, "pages page K H"]
    v: Float[Array, "pages page K H"]


KVCache = tuple[LayerKV, ...]
"""One `LayerKV` per layer. Donated to every step and returned by it."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVView:
    """Where the `T` new tokens of `B` sequences go and what they may see. `block_tables` are padded with page 0."""

    positions: Int[Array, "B T"]
    valid: Bool[Array, "B T"]
    block_tables: Int[Array, "B pages_per_sequence"]


def page_bytes(config: ModelConfig, dtype: str) -> int:
    """Bytes of one page over all layers."""
    per_token = 2 * config.num_kv_heads * config.head_dim * jnp.dtype(dtype).itemsize
    return config.num_layers * PAGE_SIZE * per_token


def pages_for(tokens: int) -> int:
    return math.ceil(tokens / PAGE_SIZE)


def new_cache(config: ModelConfig, num_pages: int, dtype: str) -> KVCache:
    """Zeroed pages for every layer."""
    shape = (num_pages, PAGE_SIZE, config.num_kv_heads, config.head_dim)
    return tuple(LayerKV(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.num_layers))


def paged_attend(config: ModelConfig, window: int | None, cache: LayerKV, view: KVView) -> AttendFunction:
    """Write the new keys and values to their pages, then attend over everything the block tables name."""
    B, _ = view.positions.shape
    pages = jnp.take_along_axis(view.block_tables, view.positions // PAGE_SIZE, axis=1)
    pages = jnp.where(view.valid, pages, 0)
    offsets = view.positions % PAGE_SIZE
    S = view.block_tables.shape[1] * PAGE_SIZE
    mask = attention_mask(view.positions, jnp.arange(S, dtype=jnp.int32), window)

    def attend_fn(q: Array, k: Array, v: Array) -> tuple[Array, LayerKV]:
        updated = LayerKV(
            cache.k.at[pages, offsets].set(k.astype(cache.k.dtype)),
            cache.v.at[pages, offsets].set(v.astype(cache.v.dtype)),
        )
        keys = updated.k[view.block_tables].reshape(B, S, *k.shape[2:])
        values = updated.v[view.block_tables].reshape(B, S, *v.shape[2:])
        return attend(q, keys.astype(q.dtype), values.astype(q.dtype), mask, config.attention_scale), updated

    return attend_fn
