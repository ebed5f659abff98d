"""Grouping of assignments by expert, and the ordered sum that brings their products back to the rows.

An assignment is one (row, choice) pair; `A = R * k` of them. All backends that promise bit-identical waves share this
file: the sort puts a row's assignments in ascending expert id whatever the slots are, and `combine` adds in that order.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Dispatch(NamedTuple):
    """Assignments sorted by (expert id, row); those of absent experts, and non-assignments, come last.

    Sorted assignment `i` is flat assignment `order[i]` (= row * k + choice), of row `row[i]` and expert `expert[i]`
    (`E` when absent), at slot `slot[i]` (the capacity when absent). Expert `e` owns sorted assignments
    `start[e] : start[e] + size[e]`; `size` is zero for absent experts.

    Worked example, k = 1, expert ids [2, 0, 2], all present: order [1, 0, 2], size [1, 0, 2], start [0, 1, 1].
    """

    order: Int[Array, " A"]
    row: Int[Array, " A"]
    expert: Int[Array, " A"]
    slot: Int[Array, " A"]
    size: Int[Array, " E"]
    start: Int[Array, " E"]

    @property
    def present(self) -> Int[Array, ""]:
        """How many assignments have a resident expert."""
        return jnp.sum(self.size)


def dispatch(ids: Int[Array, "R k"], slot_of_expert: Int[Array, " E"], capacity: int) -> Dispatch:
    """Sort the assignments. Ids of `E` and slots of `capacity` mean "no contribution"."""
    num_experts, k = slot_of_expert.shape[0], ids.shape[1]
    flat = ids.reshape(-1).astype(jnp.int32)
    slot = slots_of(flat, slot_of_expert, capacity)
    key = jnp.where(slot < capacity, flat, num_experts)
    order = jnp.argsort(key, stable=True).astype(jnp.int32)
    size = jnp.sum(key[:, None] == jnp.arange(num_experts, dtype=jnp.int32)[None, :], axis=0, dtype=jnp.int32)
    return Dispatch(order, order // k, key[order], slot[order], size, jnp.cumsum(size) - size)


def slots_of(ids: Int[Array, "..."], slot_of_expert: Int[Array, " E"], capacity: int) -> Int[Array, "..."]:
    """The slot of every id; `capacity` for absent experts and for the id `E`."""
    return jnp.append(slot_of_expert.astype(jnp.int32), jnp.int32(capacity))[ids]


def combine(
    products: Float[Array, "padded_A D"], groups: Dispatch, weights: Float[Array, "R k"], start: Float[Array, "R D"]
) -> Float[Array, "R D"]:
    """`start` plus each row's weighted products, added in ascending expert id.

    Row `i` of `products` belongs to sorted assignment `i`. Every sum is rounded to the dtype of `start`, explicitly,
    since waves pass it through memory and the compiler may otherwise keep excess precision.
    """
    R, k = weights.shape
    rank = jnp.zeros((R * k,), jnp.int32).at[groups.order].set(jnp.arange(R * k, dtype=jnp.int32))
    rank = jnp.sort(rank.reshape(R, k), axis=-1)  # ascending rank is ascending expert id, absent ones last
    present = rank < groups.present
    sorted_weights = weights.reshape(-1).astype(jnp.float32)[groups.order]
    total = start.astype(jnp.float32)
    for j in range(k):
        product = products[rank[:, j]].astype(jnp.float32)
        added = round_to(total + sorted_weights[rank[:, j]][:, None] * product, start.dtype)
        total = jnp.where(present[:, j, None], added, total)
    return total.astype(start.dtype)


def round_to(x: Float[Array, "..."], dtype: jnp.dtype) -> Float[Array, "..."]:
    """Float32 values rounded to what `dtype` can hold; unlike a cast there and back, never optimised away."""
    if dtype == jnp.float32:
        return x
    info = jnp.finfo(dtype)
    return jax.lax.reduce_precision(x, exponent_bits=info.nexp, mantissa_bits=info.nmant)


def slot_block(
    w: Float[Array, "C O I"], slot: Array, corner: tuple[Array, Array | int], shape: tuple[int, int]
) -> Float[Array, "block_O block_I"]:
    """A part of one slot's matrix, for the CPU backends; bfloat16 comes as float32, by its bits.

    XLA:CPU would slice bfloat16 as float32, that is, first convert the whole slab at every call.
    """
    if w.dtype != jnp.bfloat16:
        return jax.lax.dynamic_slice(w, (slot, *corner), (1, *shape))[0]
    w, slot, corner = jax.lax.optimization_barrier((w, slot, corner))  # else the view of the bits is hoisted: a copy
    bits = jax.lax.dynamic_slice(jax.lax.bitcast_convert_type(w, jnp.uint16), (slot, *corner), (1, *shape))[0]
    return jax.lax.bitcast_convert_type(bits.astype(jnp.uint32) << 16, jnp.float32)


def largest_divisor(n: int, limit: int) -> int:
    """The largest divisor of `n` that is at most `limit` (at least 1)."""
    return next(d for d in range(max(1, min(n, limit)), 0, -1) if n % d == 0)
