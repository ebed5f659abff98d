"""Prefill on CPU: an expert's assignments in blocks, each block one matrix product per chunk of the expert.

XLA:CPU copies a dynamic slice before a matrix product and repacks it; chunk by chunk the copy stays in cache. What a
block costs besides its rows (reading and packing the expert) is worth 15 to 30 rows, so blocks are as large as fits:
a ladder of sizes, and matrix-vector products for a few rows that stick out.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int8, Num, UInt8

from emoe_jax.config import ModelConfig
from emoe_jax.experts.weights import ExpertWeights
from emoe_jax.models.decoder import gate
from emoe_jax.moe.dequantise import is_blocked, slot_blocks
from emoe_jax.moe.dispatch import (
    Dispatch,
    combine,
    dispatch,
    largest_divisor,
    plus_bias_block,
    scaled,
    slot_block,
    slot_scales,
)
from emoe_jax.moe.loop import vector_products
from emoe_jax.moe.operands import Operands

_LADDER = (16, 32, 64, 128, 256)
"""Block sizes. Each costs compile time per layer, and the gaps cost padding."""

_VECTOR_ROWS = 8
"""Rows that do not fill a block, up to this many, go one by one: cheaper than the next larger block."""

_CHUNK_BYTES = 2 << 20

_LEFT_FACTOR_ROWS = 64
"""Block sizes up to which the weights are the left factor: then XLA:CPU multiplies few rows faster (measured)."""


def blocks(operands: Operands, config: ModelConfig) -> Float[Array, "R D"]:
    """How an expert's rows fall into blocks depends on their number only, so waves compute the same products."""
    rows, ids, weights, slot_of_expert, experts, accumulator = operands
    groups = dispatch(ids, slot_of_expert, experts.capacity)
    sizes = _ladder(rows.shape[0])

    def write(out: Array, i: Array, first: Array, product: Array) -> Array:
        return jax.lax.dynamic_update_slice(out, product, (i, first))

    def expert(e: Array, out: Array) -> Array:
        start, stop = groups.start[e], groups.start[e] + groups.size[e]
        whole = groups.size[e] // sizes[-1]
        left = groups.size[e] - whole * sizes[-1]
        for size in reversed(sizes):
            smaller = max((below for below in sizes if below < size), default=0)
            number = ((left > smaller + _VECTOR_ROWS) & (left <= size + _VECTOR_ROWS)).astype(jnp.int32)
            number = number + (whole if size == sizes[-1] else 0)
            out = jax.lax.fori_loop(
                0,
                number,
                lambda b, out, start=start, size=size: _block_products(
                    rows, groups, start + b * size, stop, size, experts, config, out
                ),
                out,
            )
            start = jnp.minimum(start + number * size, stop)
        return vector_products(rows, groups, start, stop, _VECTOR_ROWS, experts, config, write, out)

    products = jnp.zeros((ids.size + sizes[-1], rows.shape[1]), jnp.float32)  # blocks may hang over the end
    products = jax.lax.fori_loop(0, groups.size.shape[0], expert, products)
    return combine(products, groups, weights, accumulator)


def _ladder(R: int) -> Sequence[int]:
    """Block sizes for `R` rows: none larger than needed to hold them all."""
    return [size for below, size in zip((0, *_LADDER), _LADDER, strict=False) if below < R]


def _block_products(
    rows: Float[Array, "R D"],
    groups: Dispatch,
    start: Int[Array, ""],
    stop: Int[Array, ""],
    size: int,
    experts: ExpertWeights,
    config: ModelConfig,
    products: Float[Array, "padded_A D"],
) -> Float[Array, "padded_A D"]:
    """Write the products of sorted assignments `start : min(start + size, stop)`, which share an expert."""
    D, F = rows.shape[1], config.expert_hidden
    step_in = largest_divisor(F, _CHUNK_BYTES // (D * rows.dtype.itemsize))
    step_out = largest_divisor(D, _CHUNK_BYTES // (F * rows.dtype.itemsize))
    place = start + jnp.arange(size, dtype=jnp.int32)
    inside = (place < stop)[:, None]  # the rest of the block belongs to the next expert
    x = rows[groups.row[jnp.minimum(place, groups.row.shape[0] - 1)]]
    slot = groups.slot[start]

    def project_in(c: Array, hidden: Array) -> Array:
        firsts = [part * F + c * step_in for part in range(config.ffn_in_factor)]
        parts = [
            plus_bias_block(
                _chunk_product(x, experts.w_in, experts.in_scales, slot, row, step_in, F), experts.b_in, slot, row
            )
            for row in firsts
        ]
        gated = gate(jnp.concatenate(parts, axis=-1), config)
        return jax.lax.dynamic_update_slice(hidden, gated.astype(hidden.dtype), (0, c * step_in))

    hidden = jax.lax.fori_loop(0, F // step_in, project_in, jnp.zeros((size, F), rows.dtype))

    def project_out(c: Array, products: Array) -> Array:
        corner = (start, c * step_out)
        first = c * step_out
        product = _chunk_product(hidden, experts.w_out, experts.out_scales, slot, first, step_out, D)
        part = plus_bias_block(product, experts.b_out, slot, first)
        kept = jax.lax.dynamic_slice(products, corner, part.shape)
        return jax.lax.dynamic_update_slice(products, jnp.where(inside, part, kept), corner)

    return jax.lax.fori_loop(0, D // step_out, project_out, products)


def _chunk_product(
    x: Float[Array, "block_R I"],
    w: Float[Array, "C O I"] | Int8[Array, "C O I"] | UInt8[Array, "C O packed_I"],
    scales: Num[Array, "..."] | None,
    slot: Array,
    first: Array,
    step: int,
    part: int,
) -> Float[Array, "block_R block_O"]:
    """`x` times output features `first : first + step` of a slot's matrix, in float32. Each of its parts has `part`."""
    if is_blocked(scales):
        terms = slot_blocks(w, scales, slot, first, step, part)
        products = [_product(x[:, number :: len(terms)], block) for number, block in enumerate(terms)]
        return sum(products[1:], start=products[0])
    block = slot_block(w, slot, (first, 0), (step, w.shape[2]))
    return scaled(_product(x, block), slot_scales(scales, slot, first, step))


def _product(x: Float[Array, "block_R I"], block: Float[Array, "block_O I"]) -> Float[Array, "block_R block_O"]:
    x = x.astype(block.dtype)
    if x.shape[0] > _LEFT_FACTOR_ROWS:
        return jnp.dot(x, block.T, preferred_element_type=jnp.float32)
    columns = jnp.dot(block, x.T, preferred_element_type=jnp.float32)
    return jax.lax.optimization_barrier(columns).T  # without the barrier, XLA would swap the factors back
