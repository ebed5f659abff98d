"""Prefill on CPU: an expert's assignments in blocks, each block one matrix product per chunk of the expert.

XLA:CPU copies a dynamic slice before a matrix product and repacks it; chunk by chunk the copy stays in cache. What a
block costs besides its rows (reading and packing the expert) is worth about 30 rows, so blocks are as large as fits:
a ladder of sizes, one loop each, and matrix-vector products for the few rows that are not worth a block.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from emoe_jax.config import ModelConfig
from emoe_jax.experts.weights import ExpertWeights
from emoe_jax.models.decoder import gate
from emoe_jax.moe.dispatch import Dispatch, Spans, combine, dispatch, largest_divisor, spans
from emoe_jax.moe.loop import vector_products

_LADDER = (16, 32, 48, 64, 96, 128, 192, 256)
_VECTOR_ROWS = 4
_CHUNK_BYTES = 2 << 20


def blocks(
    rows: Float[Array, "R D"],
    ids: Int[Array, "R k"],
    weights: Float[Array, "R k"],
    slot_of_expert: Int[Array, " E"],
    experts: ExpertWeights,
    config: ModelConfig,
    accumulator: Float[Array, "R D"],
) -> Float[Array, "R D"]:
    """How an expert's rows fall into blocks depends on their number only, so waves compute the same products."""
    groups = dispatch(ids, slot_of_expert, experts.capacity)
    sizes = _ladder(rows.shape[0])
    products = jnp.zeros((ids.size + sizes[-1], rows.shape[1]), jnp.float32)  # blocks may hang over the end
    full = groups.size // sizes[-1]
    left = groups.size - full * sizes[-1]
    left_start = groups.start + full * sizes[-1]
    few = spans(left_start, jnp.where(left <= _VECTOR_ROWS, left, 0), ids.size)
    products = vector_products(rows, groups, few, experts, config, products)
    smaller = _VECTOR_ROWS
    for size in sizes:
        mine = spans(left_start, jnp.where((left > smaller) & (left <= size), left, 0), ids.size)
        products = _block_products(rows, groups, mine, size, experts, config, products)
        smaller = size
    products = _block_products(
        rows, groups, _full(groups, full, sizes[-1], ids.size), sizes[-1], experts, config, products
    )
    return combine(products, groups, weights, accumulator)


def _ladder(R: int) -> Sequence[int]:
    """Block sizes for `R` rows: none larger than needed to hold them all."""
    return [size for below, size in zip((0, *_LADDER), _LADDER, strict=False) if below < R]


def _full(groups: Dispatch, full: Int[Array, " E"], size: int, assignments: int) -> Spans:
    """The spans of whole blocks of `size`: expert `e` has `full[e]` of them."""
    end = jnp.cumsum(full)
    block = jnp.arange(max(1, assignments // size), dtype=jnp.int32)
    expert = jnp.searchsorted(end, block, side="right").astype(jnp.int32)
    nth = block - (end - full)[expert]
    return Spans(groups.start[expert] + nth * size, jnp.full_like(block, size), end[-1])


def _block_products(
    rows: Float[Array, "R D"],
    groups: Dispatch,
    busy: Spans,
    size: int,
    experts: ExpertWeights,
    config: ModelConfig,
    products: Float[Array, "X D"],
) -> Float[Array, "X D"]:
    """Write the products of all assignments in `busy` (spans of at most `size` in one expert) into `products`."""
    D, F = rows.shape[1], config.expert_hidden
    step_in = largest_divisor(F, _CHUNK_BYTES // (D * rows.dtype.itemsize))
    step_out = largest_divisor(D, _CHUNK_BYTES // (F * rows.dtype.itemsize))
    place = jnp.arange(size, dtype=jnp.int32)

    def block(b: Array, products: Array) -> Array:
        start = busy.start[b]
        x = rows[groups.row[jnp.minimum(start + place, groups.row.shape[0] - 1)]]
        slot = groups.slot[start]
        inside = (place < busy.size[b])[:, None]  # the rest of the block belongs to the next expert

        def project_in(c: Array, hidden: Array) -> Array:
            firsts = [part * F + c * step_in for part in range(config.ffn_in_factor)]
            parts = [_chunk_product(x, experts.w_in, slot, row, step_in) for row in firsts]
            gated = gate(jnp.concatenate(parts, axis=-1), config)
            return jax.lax.dynamic_update_slice(hidden, gated.astype(hidden.dtype), (0, c * step_in))

        hidden = jax.lax.fori_loop(0, F // step_in, project_in, jnp.zeros((size, F), rows.dtype))

        def project_out(c: Array, products: Array) -> Array:
            corner = (start, c * step_out)
            part = _chunk_product(hidden, experts.w_out, slot, c * step_out, step_out)
            kept = jax.lax.dynamic_slice(products, corner, part.shape)
            return jax.lax.dynamic_update_slice(products, jnp.where(inside, part, kept), corner)

        return jax.lax.fori_loop(0, D // step_out, project_out, products)

    return jax.lax.fori_loop(0, busy.count, block, products)


def _chunk_product(
    x: Float[Array, "B I"], w: Float[Array, "C O I"], slot: Array, first: Array, step: int
) -> Float[Array, "B X"]:
    """`x` times output features `first : first + step` of a slot's matrix, in float32."""
    block = jax.lax.dynamic_slice(w, (slot, first, 0), (1, step, w.shape[2]))[0]
    return jnp.dot(x, block.T, preferred_element_type=jnp.float32)
