"""Attention over paged keys and values, written and read through block tables."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from emoe_jax.attention.sums import AttentionSums, attention_mask
from emoe_jax.config import ModelConfig
from emoe_jax.models.decoder import AttendFunction
from emoe_jax.scheduling.pages import PAGE_SIZE

_BLOCK_PAGES = 8
"""Pages attended over at once. On CPU 4 and 16 take 10 to 60 % longer at contexts of about a hundred tokens."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerKV:
    """Keys (rotated) and values of one layer. Page 0 is the trash page: padded rows write there."""

    k: Float[Array, "pages page K H"]
    v: Float[Array, "pages page K H"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVView:
    """Where the `T` new tokens of `B` sequences go and what they may see. `block_tables` are padded with page 0."""

    positions: Int[Array, "B T"]
    valid: Bool[Array, "B T"]
    block_tables: Int[Array, "B pages_per_sequence"]


def paged_attend(config: ModelConfig, window: int | None, cache: LayerKV, view: KVView) -> AttendFunction:
    """Write the new keys and values to their pages, then attend over what the block tables name, a block at a time.

    Blocks run from the first that any new token sees to the last, so cost follows the contexts at hand and not the
    width of the block tables; a block that a row does not see leaves its sums as they are, bit for bit. What pages
    hold outside a row's context (stale values, padding, the trash page) cannot reach it, even if it is not finite.
    Rows that pad the batch get zeros.
    """
    pages = jnp.take_along_axis(view.block_tables, view.positions // PAGE_SIZE, axis=1)
    pages = jnp.where(view.valid, pages, 0)
    offsets = view.positions % PAGE_SIZE
    width = min(_BLOCK_PAGES, view.block_tables.shape[1])
    tables = jnp.pad(view.block_tables, ((0, 0), (0, -view.block_tables.shape[1] % width)))
    size = width * PAGE_SIZE
    last = jnp.max(jnp.where(view.valid, view.positions, 0)) // size
    first = jnp.int32(0)
    if window is not None:
        oldest = jnp.min(jnp.where(view.valid, view.positions, jnp.iinfo(jnp.int32).max))
        first = jnp.minimum(jnp.maximum(oldest - window + 1, 0) // size, last)

    def attend_fn(q: Array, k: Array, v: Array) -> tuple[Array, LayerKV]:
        updated = LayerKV(
            cache.k.at[pages, offsets].set(k.astype(cache.k.dtype)),
            cache.v.at[pages, offsets].set(v.astype(cache.v.dtype)),
        )
        B, _, K, H = k.shape

        def block(index: Array, sums: AttentionSums) -> AttentionSums:
            named = jax.lax.dynamic_slice_in_dim(tables, index * width, width, axis=1)
            keys = updated.k[named].reshape(B, size, K, H).astype(q.dtype)
            values = updated.v[named].reshape(B, size, K, H).astype(q.dtype)
            positions = index * size + jnp.arange(size, dtype=jnp.int32)
            mask = attention_mask(view.positions, positions, window)
            return sums.add(q, keys, values, mask, config.attention_scale)

        sums = jax.lax.fori_loop(first, last + 1, block, AttentionSums.zero(q, K))
        return jnp.where(view.valid[:, :, None, None], sums.output(q.dtype), 0), updated

    return attend_fn
