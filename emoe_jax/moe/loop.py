"""Decode on CPU: each assignment is a matrix-vector product that reads its expert's slot in place.

XLA:CPU fuses a dynamic slice into a matrix-vector product, and splits that loop over the cores, so an expert is read
straight from the slab at memory speed; for two or more rows at once it would copy the expert out first and repack it.
Rows that share an expert are visited chunk by chunk, so that only the first reads from memory, the others from cache.
Weights in blocks are not fused: a chunk of them becomes float32 once, for all rows that share the expert.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int8

from emoe_jax.config import ModelConfig
from emoe_jax.experts.weights import ExpertWeights
from emoe_jax.models.decoder import gate
from emoe_jax.moe.dequantise import Blocks, is_blocked, multiply, slot_blocks
from emoe_jax.moe.dispatch import (
    Dispatch,
    dispatch,
    largest_divisor,
    plus_bias_block,
    round_to,
    scaled,
    slot_block,
    slot_scales,
)
from emoe_jax.moe.operands import Operands

Write = Callable[[Array, Array, Array, Array], Array]
"""`(out, assignment, first feature, product [1, step])` -> `out` with the product written or added."""

_CHUNK_BYTES = 4 << 20
"""Weights read by all rows of an expert before the next chunk: fits a shared cache, few enough iterations."""

_VECTOR_BYTES = 8 << 10
"""XLA:CPU fuses the slice only below 16 KiB of vector; longer contractions are cut in pieces of at most this."""


def loop(operands: Operands, config: ModelConfig) -> Float[Array, "R D"]:
    """Time grows with the assignments, not with the slots; a row's product never depends on the other rows."""
    rows, ids, weights, slot_of_expert, experts, accumulator = operands
    R = rows.shape[0]
    groups = dispatch(ids, slot_of_expert, experts.capacity)
    sorted_weights = weights.reshape(-1).astype(jnp.float32)[groups.order]

    def add(out: Array, i: Array, first: Array, product: Array) -> Array:
        at = (groups.row[i], first)
        total = jax.lax.dynamic_slice(out, at, product.shape) + sorted_weights[i] * product
        return jax.lax.dynamic_update_slice(out, round_to(total, rows.dtype), at)

    def expert(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        start, out = carry
        stop = start + groups.size[groups.expert[start]]
        return stop, vector_products(rows, groups, start, stop, R, experts, config, add, out)

    # Ascending expert id, by the sort; in float32, with every sum rounded to what the rows' dtype holds.
    first = (jnp.int32(0), accumulator.astype(jnp.float32))
    return jax.lax.while_loop(lambda carry: carry[0] < groups.present, expert, first)[1].astype(rows.dtype)


def vector_products(
    rows: Float[Array, "R D"],
    groups: Dispatch,
    start: Int[Array, ""],
    stop: Int[Array, ""],
    most: int,
    experts: ExpertWeights,
    config: ModelConfig,
    write: Write,
    out: Array,
) -> Array:
    """`write` the products of sorted assignments `start : stop`, at most `most`, which have one expert in common."""
    D, F = rows.shape[1], config.expert_hidden
    alone = most == 1 and not is_blocked(experts.in_scales)  # no other to share a chunk with
    step_in = F if alone else largest_divisor(F, _CHUNK_BYTES // (config.ffn_in_factor * D * rows.dtype.itemsize))
    step_out = D if alone else largest_divisor(D, _CHUNK_BYTES // (F * rows.dtype.itemsize))

    def shared_in(first: Array) -> Sequence[Blocks] | None:
        if not is_blocked(experts.in_scales):
            return None
        return [
            slot_blocks(experts.w_in, experts.in_scales, groups.slot[start], part * F + first, step_in, F)
            for part in range(config.ffn_in_factor)
        ]

    def shared_out(first: Array) -> Blocks | None:
        if not is_blocked(experts.out_scales):
            return None
        return slot_blocks(experts.w_out, experts.out_scales, groups.slot[start], first, step_out, D)

    def project_in(hidden: Array, i: Array, first: Array, shared: Sequence[Blocks] | None) -> Array:
        x = jax.lax.dynamic_index_in_dim(rows, groups.row[i], 0)
        firsts = [part * F + first for part in range(config.ffn_in_factor)]
        slot = groups.slot[i]
        if shared is None:
            parts = [_vector_product(x, experts.w_in, experts.in_scales, slot, row, step_in) for row in firsts]
        else:
            parts = [multiply(x, blocks) for blocks in shared]
        parts = [plus_bias_block(part, experts.b_in, slot, row) for part, row in zip(parts, firsts, strict=True)]
        gated = gate(jnp.concatenate(parts, axis=-1), config)
        return jax.lax.dynamic_update_slice(hidden, gated.astype(hidden.dtype), (i - start, first))

    def project_out(out: Array, i: Array, first: Array, shared: Blocks | None) -> Array:
        x = jax.lax.dynamic_index_in_dim(hidden, i - start, 0)
        slot = groups.slot[i]
        if shared is None:
            product = _vector_product(x, experts.w_out, experts.out_scales, slot, first, step_out)
        else:
            product = multiply(x, shared)
        return write(out, i, first, plus_bias_block(product, experts.b_out, slot, first))

    hidden = jnp.zeros((most, F), rows.dtype)
    if alone:
        hidden = project_in(hidden, start, jnp.int32(0), None)
        return project_out(out, start, jnp.int32(0), None)
    hidden = _visit(start, stop, F, step_in, shared_in, project_in, hidden)
    return _visit(start, stop, D, step_out, shared_out, project_out, out)


def _visit(
    start: Array,
    stop: Array,
    size: int,
    step: int,
    share: Callable[[Array], Any],
    body: Callable[[Array, Array, Array, Any], Array],
    carry: Array,
) -> Array:
    """`body(carry, assignment, first feature of a chunk, share(first feature))` for every assignment, chunk after
    chunk. What is shared is computed once for each chunk, and lies in memory."""

    def chunk(c: Array | int, carry: Array) -> Array:
        first = jnp.int32(c * step)
        shared = share(first)
        return jax.lax.fori_loop(start, stop, lambda i, value: body(value, i, first, shared), carry)

    return chunk(0, carry) if size == step else jax.lax.fori_loop(0, size // step, chunk, carry)


def _vector_product(
    x: Float[Array, "1 I"],
    w: Float[Array, "C O I"] | Int8[Array, "C O I"],
    scales: Float[Array, "C O"] | None,
    slot: Array,
    first: Array,
    step: int,
) -> Float[Array, "1 block_O"]:
    """`x` times output features `first : first + step` of a slot's matrix, in float32.

    `slot` must come from the innermost loop: a slice that outer loops could share would be hoisted, that is, copied.
    """
    inner = x.shape[1]
    piece = largest_divisor(inner, _VECTOR_BYTES // 4)
    total = None
    for start in range(0, inner, piece):
        block = slot_block(w, slot, (first, start), (step, piece))
        part = jnp.dot(x[:, start : start + piece].astype(block.dtype), block.T, preferred_element_type=jnp.float32)
        total = part if total is None else total + part
    assert total is not None
    return scaled(total, slot_scales(scales, slot, first, step))
