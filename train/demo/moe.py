"""Differentiable mixture-of-experts layers for training on CPU: rows gathered into one buffer per expert."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from emoe_jax.experts.weights import ExpertWeights

CAPACITY_FACTOR = (
    1.5  # rows an expert can take in training, as a multiple of an even share; what comes later is dropped
)


def capacity(rows: int, k: int, experts: int) -> int:
    """Rows of one expert's buffer."""
    return min(rows, math.ceil(CAPACITY_FACTOR * rows * k / experts))


def moe_buffers(
    x: Float[Array, "R D"],
    ids: Int[Array, "R k"],
    weights: Float[Array, "R k"],
    experts: ExpertWeights,
) -> Float[Array, "R D"]:
    """Each row through its `k` experts (SwiGLU), weighted. An id of `E` means no assignment.

    One batched product over `E` buffers of equal size runs at twice the speed of products over smaller blocks of rows,
    which would drop nothing: on XLA's CPU backend the size of a single product decides.
    """
    R, k = ids.shape
    E, D = experts.capacity, x.shape[1]
    source, place = _layout(ids, E, capacity(R, k, E))
    buffers = _dispatch(x, source, place.reshape(R, k)).reshape(E, -1, D)
    gate, up = (jnp.einsum("ecd,efd->ecf", buffers, half) for half in jnp.split(experts.w_in, 2, axis=1))
    out = jnp.einsum("ecf,edf->ecd", jax.nn.silu(gate) * up, experts.w_out)
    collected = _collect(out.reshape(-1, D), source, place).reshape(R, k, D)
    return jnp.sum(collected * weights[..., None], axis=1)  # as an einsum it is `R` tiny products, one by one


def dropped(ids: Int[Array, "R k"], experts: int) -> Float[Array, ""]:
    """Share of assignments that find their expert's buffer full."""
    R, k = ids.shape
    counts = jnp.bincount(ids.reshape(-1), length=experts)
    return jnp.sum(jnp.maximum(counts - capacity(R, k, experts), 0)) / jnp.maximum(jnp.sum(counts), 1)


def _layout(ids: Int[Array, "R k"], experts: int, size: int) -> tuple[Int[Array, " padded_A"], Int[Array, " A"]]:
    """`source[p]`: the assignment (row * k + choice) in place `p` of the `E * size` places, `R * k` where empty;
    `place[a]`: where assignment `a` lies, `E * size` when dropped."""
    flat = ids.reshape(-1)
    total = flat.shape[0]
    order = jnp.argsort(flat, stable=True)
    counts = jnp.bincount(flat, length=experts)
    expert = flat[order]
    rank = jnp.arange(total) - (jnp.cumsum(counts) - counts)[jnp.minimum(expert, experts - 1)]
    kept = (rank < size) & (expert < experts)
    target = jnp.where(kept, expert * size + rank, experts * size).astype(jnp.int32)
    source = jnp.full((experts * size + 1,), total, jnp.int32).at[target].set(order.astype(jnp.int32))[:-1]
    return source, jnp.zeros((total,), jnp.int32).at[order].set(target)


# Both lookups below are gathers forwards and backwards. Left to autodiff the backward passes are scatters, which XLA's
# CPU backend runs one row at a time.


def _take(rows: Float[Array, "n D"], index: Array) -> Array:
    """Rows at `index`; an index one past the end gives zeros."""
    last = rows.shape[0] - 1
    return jnp.where((index <= last)[..., None], rows[jnp.minimum(index, last)], 0)


@jax.custom_vjp
def _dispatch(
    x: Float[Array, "R D"], source: Int[Array, " padded_A"], place: Int[Array, "R k"]
) -> Float[Array, "padded_A D"]:
    return _take(x, source // place.shape[1])


def _dispatch_forward(x: Array, source: Array, place: Array) -> tuple[Array, Array]:
    return _dispatch(x, source, place), place


def _dispatch_backward(place: Array, gradient: Array) -> tuple[Array, None, None]:
    return jnp.sum(_take(gradient, place), axis=1), None, None


_dispatch.defvjp(_dispatch_forward, _dispatch_backward)


@jax.custom_vjp
def _collect(
    out: Float[Array, "padded_A D"], source: Int[Array, " padded_A"], place: Int[Array, " A"]
) -> Float[Array, "A D"]:
    return _take(out, place)


def _collect_forward(out: Array, source: Array, place: Array) -> tuple[Array, Array]:
    return _collect(out, source, place), source


def _collect_backward(source: Array, gradient: Array) -> tuple[Array, None, None]:
    return _take(gradient, source), None, None


_collect.defvjp(_collect_forward, _collect_backward)
