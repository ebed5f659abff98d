"""Grouping of assignments by expert, and the ordered sum that brings their products back to the rows.

An assignment is one (row, choice) pair; `A = R * k` of them. All backends that promise bit-identical waves share this
file: the sort puts a row's assignments in ascending expert id whatever the slots are, and `combine` adds in that order.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int8

_COUNTED = 256
"""Assignments up to which counting comparisons sorts them: one vector operation, where a GPU sorts in many kernels."""


class Dispatch(NamedTuple):
    """Assignments sorted by (expert id, row); those of absent experts, and non-assignments, come last.

    Sorted assignment `i` is flat assignment `order[i]` (= row * k + choice), of row `row[i]` and expert `expert[i]`
    (`E` when absent), at slot `slot[i]` (the capacity when absent); `place` is the inverse of `order`. Expert `e` owns
    sorted assignments `start[e] : start[e] + size[e]`; `size` is zero for absent experts.

    Worked example, k = 1, expert ids [2, 0, 2], all present: order [1, 0, 2], place [1, 0, 2], size [1, 0, 2],
    start [0, 1, 1].
    """

    order: Int[Array, " A"]
    place: Int[Array, " A"]
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
    order, place = _sorted(key)
    experts = jnp.arange(num_experts, dtype=jnp.int32)[None, :]
    size = jnp.sum(key[:, None] == experts, axis=0, dtype=jnp.int32)
    start = jnp.sum(key[:, None] < experts, axis=0, dtype=jnp.int32)  # a cumulative sum is a loop in JAX 0.12 on CUDA
    return Dispatch(order, place, order // k, key[order], slot[order], size, start)


def _sorted(key: Int[Array, " A"]) -> tuple[Int[Array, " A"], Int[Array, " A"]]:
    """`(order, place)`: which number each place of the stably sorted keys has, and the inverse."""
    A = key.shape[0]
    numbers = jnp.arange(A, dtype=jnp.int32)
    if A > _COUNTED:
        order = jnp.argsort(key, stable=True).astype(jnp.int32)
        return order, jnp.zeros_like(order).at[order].set(numbers, unique_indices=True)
    distinct = key * A + numbers
    place = jnp.sum(distinct[None, :] < distinct[:, None], axis=1, dtype=jnp.int32)
    order = jnp.sum(jnp.where(place[None, :] == numbers[:, None], numbers[None, :], 0), axis=1, dtype=jnp.int32)
    return order, place


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
    rank = _ascending(groups.place.reshape(R, k))  # is ascending expert id, absent ones last
    present = rank < groups.present
    sorted_weights = weights.reshape(-1).astype(jnp.float32)[groups.order]
    total = start.astype(jnp.float32)
    for j in range(k):
        product = products[rank[:, j]].astype(jnp.float32)
        added = round_to(total + sorted_weights[rank[:, j]][:, None] * product, start.dtype)
        total = jnp.where(present[:, j, None], added, total)
    return total.astype(start.dtype)


def _ascending(places: Int[Array, "R k"]) -> Int[Array, "R k"]:
    """Each line sorted, by counting; no line has a number twice."""
    smaller = jnp.sum(places[:, None, :] < places[:, :, None], axis=-1, dtype=jnp.int32)
    here = smaller[:, None, :] == jnp.arange(places.shape[1], dtype=jnp.int32)[None, :, None]
    return jnp.sum(jnp.where(here, places[:, None, :], 0), axis=-1, dtype=jnp.int32)


def round_to(x: Float[Array, "..."], dtype: jnp.dtype) -> Float[Array, "..."]:
    """Float32 values rounded to what `dtype` can hold; unlike a cast there and back, never optimised away."""
    if dtype == jnp.float32:
        return x
    info = jnp.finfo(dtype)
    return jax.lax.reduce_precision(x, exponent_bits=info.nexp, mantissa_bits=info.nmant)


def slot_block(
    w: Float[Array, "C O I"] | Int8[Array, "C O I"],
    slot: Array,
    corner: tuple[Array, Array | int],
    shape: tuple[int, int],
) -> Float[Array, "block_O block_I"]:
    """A part of one slot's matrix, for the CPU backends, without its scales. int8 and bfloat16 come as float32.

    XLA:CPU would slice bfloat16 as float32, that is, first convert the whole slab at every call. So bfloat16 is taken
    by its bits. It fuses the conversion of int8 with the slice and with a vector product.
    """
    if w.dtype != jnp.bfloat16:
        block = jax.lax.dynamic_slice(w, (slot, *corner), (1, *shape))[0]
        return block.astype(jnp.float32) if w.dtype == jnp.int8 else block
    w, slot, corner = jax.lax.optimization_barrier((w, slot, corner))  # else the view of the bits is hoisted: a copy
    bits = jax.lax.dynamic_slice(jax.lax.bitcast_convert_type(w, jnp.uint16), (slot, *corner), (1, *shape))[0]
    return jax.lax.bitcast_convert_type(bits.astype(jnp.uint32) << 16, jnp.float32)


def plus_bias(
    products: Float[Array, "n O"], bias: Float[Array, "C O 1"] | None, slot: Int[Array, " n"]
) -> Float[Array, "n O"]:
    """Products of rows whose experts lie in these slots, with the experts' biases where the family has any."""
    return products if bias is None else products + bias[slot, :, 0].astype(jnp.float32)


def plus_bias_block(
    products: Float[Array, "block_R block_O"], bias: Float[Array, "C O 1"] | None, slot: Array, first: Array
) -> Float[Array, "block_R block_O"]:
    """The same of one slot's output features from `first` on, for the CPU backends."""
    if bias is None:
        return products
    return products + slot_block(bias, slot, (first, 0), (products.shape[1], 1)).astype(jnp.float32).T


def slot_scales(
    scales: Float[Array, "C O"] | None, slot: Array, first: Array | int, step: int
) -> Float[Array, " block_O"] | None:
    """Those of output features `first : first + step` of a slot's matrix; none where weights have no scales."""
    return None if scales is None else jax.lax.dynamic_slice(scales, (slot, first), (1, step))[0]


def scaled(
    products: Float[Array, "... block_O"], scales: Float[Array, "... block_O"] | None
) -> Float[Array, "... block_O"]:
    """Products of rows with quantised weights, times the scales of their output channels. Others are as they are."""
    if scales is None:
        return products
    return products * scales.reshape((1,) * (products.ndim - scales.ndim) + scales.shape)


def largest_divisor(n: int, limit: int) -> int:
    """The largest divisor of `n` that is at most `limit` (at least 1)."""
    return next(d for d in range(max(1, min(n, limit)), 0, -1) if n % d == 0)
