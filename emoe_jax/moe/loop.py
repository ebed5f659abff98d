"""Decode on CPU: each assignment is a matrix-vector product that reads its expert's slot in place.

XLA:CPU fuses a dynamic slice into a matrix-vector product, and splits that loop over the cores, so an expert is read
straight from the slab at memory speed; for two or more rows at once it would copy the expert out first and repack it.
Rows that share an expert are visited chunk by chunk, so that only the first reads from memory, the others from cache.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from emoe_jax.config import ModelConfig
from emoe_jax.experts.weights import ExpertWeights
from emoe_jax.models.decoder import gate
from emoe_jax.moe.dispatch import Dispatch, Spans, combine, dispatch, largest_divisor, spans

_CHUNK_BYTES = 4 << 20
"""Weights read by all rows of an expert before the next chunk: fits a shared cache, few enough iterations."""

_VECTOR_BYTES = 8 << 10
"""XLA:CPU fuses the slice only below 16 KiB of vector; longer contractions are cut in pieces of at most this."""


def loop(
    rows: Float[Array, "R D"],
    ids: Int[Array, "R k"],
    weights: Float[Array, "R k"],
    slot_of_expert: Int[Array, " E"],
    experts: ExpertWeights,
    config: ModelConfig,
    accumulator: Float[Array, "R D"],
) -> Float[Array, "R D"]:
    """Time grows with the assignments, not with the slots; a row's product never depends on the other rows."""
    groups = dispatch(ids, slot_of_expert, experts.capacity)
    busy = spans(groups.start, groups.size, ids.size)
    products = jnp.zeros((ids.size, rows.shape[1]), jnp.float32)
    products = vector_products(rows, groups, busy, experts, config, products)
    return combine(products, groups, weights, accumulator)


def vector_products(
    rows: Float[Array, "R D"],
    groups: Dispatch,
    busy: Spans,
    experts: ExpertWeights,
    config: ModelConfig,
    products: Float[Array, "X D"],
) -> Float[Array, "X D"]:
    """Write the products of all assignments in `busy` (each span within one expert) into `products`."""
    (R, D), F = rows.shape, config.expert_hidden
    alone = R == 1  # nobody to share a chunk with
    step_in = F if alone else largest_divisor(F, _CHUNK_BYTES // (config.ffn_in_factor * D * rows.dtype.itemsize))
    step_out = D if alone else largest_divisor(D, _CHUNK_BYTES // (F * rows.dtype.itemsize))

    def project_in(i: Array, first: Array, hidden: Array) -> Array:
        x = jax.lax.dynamic_index_in_dim(rows, groups.row[i], 0)
        firsts = [part * F + first for part in range(config.ffn_in_factor)]
        parts = [_vector_product(x, experts.w_in, groups.slot[i], row, step_in) for row in firsts]
        gated = gate(jnp.concatenate(parts, axis=-1), config)
        return jax.lax.dynamic_update_slice(hidden, gated.astype(hidden.dtype), (i, first))

    def project_out(i: Array, first: Array, hidden: Array, products: Array) -> Array:
        x = jax.lax.dynamic_index_in_dim(hidden, i, 0)
        part = _vector_product(x, experts.w_out, groups.slot[i], first, step_out)
        return jax.lax.dynamic_update_slice(products, part, (i, first))

    def span(s: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        hidden, products = carry
        start, stop = busy.start[s], busy.start[s] + busy.size[s]
        hidden = _visit(start, stop, F, step_in, project_in, hidden)
        return hidden, _visit(start, stop, D, step_out, lambda i, c, y: project_out(i, c, hidden, y), products)

    hidden = jnp.zeros((groups.order.shape[0], F), rows.dtype)
    return jax.lax.fori_loop(0, busy.count, span, (hidden, products))[1]


def _visit(
    start: Array, stop: Array, size: int, step: int, body: Callable[[Array, Array, Array], Array], carry: Array
) -> Array:
    """`body(assignment, first feature of a chunk, carry)` for all assignments of a span, chunk after chunk."""

    def chunk(c: Array | int, carry: Array) -> Array:
        return jax.lax.fori_loop(start, stop, lambda i, value: body(i, jnp.int32(c * step), value), carry)

    return chunk(0, carry) if size == step else jax.lax.fori_loop(0, size // step, chunk, carry)


def _vector_product(
    x: Float[Array, "1 I"], w: Float[Array, "C O I"], slot: Array, first: Array, step: int
) -> Float[Array, "1 X"]:
    """`x` times output features `first : first + step` of a slot's matrix, in float32.

    `slot` must come from the innermost loop: a slice that outer loops could share would be hoisted, that is, copied.
    """
    inner = x.shape[1]
    piece = largest_divisor(inner, _VECTOR_BYTES // x.dtype.itemsize)
    total = None
    for start in range(0, inner, piece):
        block = jax.lax.dynamic_slice(w, (slot, first, start), (1, step, piece))[0]
        part = jnp.dot(x[:, start : start + piece], block.T, preferred_element_type=jnp.float32)
        total = part if total is None else total + part
    assert total is not None
    return total
