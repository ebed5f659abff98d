"""GPU: flash attention over pages, as one Pallas kernel on Triton that reads the pages in place.

A program takes a block of queries that share a kv head (the heads of a group, for some rows of one group of the view)
and a part of the pages that they see. For decoding rows the parts are many, so that a small batch fills the GPU; their
sums are combined outside (Dao et al. 2023, "Flash-Decoding"). Trip counts are the kernel's own and follow the positions
of the block at hand.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from emoe_jax.attention.operands import Operands
from emoe_jax.attention.schedule import number_of_splits, strides
from emoe_jax.scheduling.pages import PAGE_SIZE

_MIN_TILE = 16  # Triton's smallest matrix product
_MAX_ROWS = 64  # of a query block
_WIDE = 256  # numbers of a head above which a query block has half as many rows, so that its sums fit the registers
_MASKED = float(jnp.finfo(jnp.float32).min)


def triton(operands: Operands, *, interpret: bool = False) -> Float[Array, "B T N Hv"]:
    """`interpret` runs the kernel without a GPU, slowly. Head dims and group sizes are padded inside the kernel."""
    q, cache, view, sinks, window, scale = operands
    B, T, N, H = q.shape
    K = cache.kv_heads
    rows = T * (N // K)
    block = min(max(_MIN_TILE, pl.next_power_of_2(rows)), _MAX_ROWS if H <= _WIDE else _MAX_ROWS // 2)
    blocks = pl.cdiv(rows, block)
    splits = number_of_splits(B * K * blocks, view.block_tables.shape[1], decoding=T == 1)
    positions = jnp.where(view.valid, view.positions, -1)
    logits = jnp.zeros(1, jnp.float32) if sinks is None else sinks.astype(jnp.float32)
    partial_shape = (B, T, N, splits)
    kernel = partial(
        _kernel,
        kv_heads=K,
        block=block,
        splits=splits,
        stride=_stride_pages(H, cache.k.dtype.itemsize),
        value_dim=cache.value_dim,
        window=window,
        scale=scale,
        sinks=sinks is not None,
    )
    values, weight, highest = pl.pallas_call(
        kernel,
        grid=(B, K * blocks, splits),
        out_shape=(
            jax.ShapeDtypeStruct((*partial_shape, cache.value_dim), q.dtype if splits == 1 else jnp.float32),
            jax.ShapeDtypeStruct(partial_shape, jnp.float32),
            jax.ShapeDtypeStruct(partial_shape, jnp.float32),
        ),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="paged_attention",
    )(positions, view.block_tables, logits, q, *((cache.k,) if cache.v is None else (cache.k, cache.v)))
    if splits == 1:
        return values[..., 0, :]
    mean = _combine(values, weight, highest)
    return jnp.where(view.valid[..., None, None], mean, 0).astype(q.dtype)


def _stride_pages(head_dim: int, itemsize: int) -> int:
    """Pages that a program reads at once: fewer of wide heads, so that two strides fit its shared memory."""
    if head_dim <= 128:
        return 4
    return 1 if head_dim > _WIDE and itemsize > 2 else 2


def _combine(
    values: Float[Array, "B T N splits Hv"],
    weight: Float[Array, "B T N splits"],
    highest: Float[Array, "B T N splits"],
) -> Float[Array, "B T N Hv"]:
    """The mean over all parts, from sums that are relative to each part's highest score."""
    kept = jnp.exp(highest - jnp.max(highest, axis=-1, keepdims=True))
    return jnp.sum(values * kept[..., None], axis=-2) / jnp.sum(weight * kept, axis=-1)[..., None]


def _kernel(
    positions_ref: Any,
    tables_ref: Any,
    sinks_ref: Any,
    q_ref: Any,
    *refs: Any,
    kv_heads: int,
    block: int,
    splits: int,
    stride: int,
    value_dim: int,
    window: int | None,
    scale: float,
    sinks: bool,
) -> None:
    """`refs` are keys, values unless they are the first `value_dim` numbers of the keys, and the three outputs.

    Those first numbers are then read once, and the other numbers of the keys beside them.
    """
    k_ref, *v_refs, values_ref, weight_ref, highest_ref = refs
    b, split = pl.program_id(0), pl.program_id(2)
    head, first_row = pl.program_id(1) % kv_heads, (pl.program_id(1) // kv_heads) * block
    _, T, N, H = q_ref.shape
    group = N // kv_heads
    keys = stride * PAGE_SIZE
    others = H - value_dim  # numbers of a key that are no value
    precision = jax.lax.Precision.HIGHEST if q_ref.dtype == jnp.float32 else None  # no TF32

    row = first_row + jnp.arange(block, dtype=jnp.int32)
    inside = row < T * group
    t, n = row // group, head * group + row % group  # beyond `T` where a row is not inside
    position = plgpu.load(positions_ref.at[b, t], mask=inside, other=-1)
    real = position >= 0
    highest_position = jnp.max(position)
    lowest_position = jnp.min(jnp.where(real, position, highest_position))
    plan = strides(lowest_position, highest_position, window, split, splits, stride)

    lane = jnp.arange(max(_MIN_TILE, pl.next_power_of_2(value_dim)), dtype=jnp.int32)[None, :]
    other_lane = jnp.arange(max(_MIN_TILE, pl.next_power_of_2(max(others, 1))), dtype=jnp.int32)[None, :]

    def queries(first: int, lane: Array, numbers: int) -> Array:
        at = b, t[:, None], n[:, None], first + lane
        return plgpu.load(q_ref.at[at], mask=real[:, None] & (lane < numbers), other=0)

    q = queries(0, lane, value_dim)
    other_q = queries(value_dim, other_lane, others) if others else None
    key = jnp.arange(keys, dtype=jnp.int32)

    def add(index: Array, sums: tuple[Array, Array, Array], *, masked: bool) -> tuple[Array, Array, Array]:
        """The sums with one stride more; `masked` where some row may not see all of it."""
        values, weight, highest = sums
        place = plan.first + index * stride + key // PAGE_SIZE
        there = place < plan.end
        page = plgpu.load(tables_ref.at[b, jnp.minimum(place, tables_ref.shape[1] - 1)], mask=there, other=0)

        def read(ref: Any, first: int, lane: Array, numbers: int) -> Array:
            at = page[:, None], head, (key % PAGE_SIZE)[:, None], first + lane
            return plgpu.load(ref.at[at], mask=there[:, None] & (lane < numbers), other=0).astype(q.dtype)

        k = read(k_ref, 0, lane, value_dim)
        v = read(v_refs[0], 0, lane, value_dim) if v_refs else k
        scores = plgpu.dot(q, k, trans_b=True, precision=precision)
        if other_q is not None:
            other_k = read(k_ref, value_dim, other_lane, others)
            scores += plgpu.dot(other_q, other_k, trans_b=True, precision=precision)
        scores *= scale
        seen = None
        if masked:
            distance = position[:, None] - ((plan.first + index * stride) * PAGE_SIZE + key)[None, :]
            seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
            scores = jnp.where(seen, scores, _MASKED)
        above = jnp.maximum(highest, jnp.max(scores, axis=1))
        kept = jnp.exp(highest - above)
        powers = jnp.exp(scores - above[:, None])
        values *= kept[:, None]
        if seen is not None:  # what a row does not see must not reach it: 0 times NaN is NaN
            powers = jnp.where(seen, powers, 0.0)
            finite = jnp.abs(v.astype(jnp.float32)) < jnp.inf
            v = jnp.where(finite, v, 0)
            lost = jnp.max(jnp.where(finite, 0.0, 1.0), axis=1)
            lost = jnp.max(jnp.where(seen, lost[None, :], 0.0), axis=1)
            values = jnp.where(lost[:, None] > 0, jnp.nan, values)
        values += plgpu.dot(powers.astype(v.dtype), v, precision=precision)
        return values, weight * kept + jnp.sum(powers, axis=1), above

    weight, highest = jnp.zeros(block, jnp.float32), jnp.full(block, _MASKED, jnp.float32)
    if sinks:  # a key whose value is zero, seen by the first part
        first = split == 0
        logit = plgpu.load(sinks_ref.at[n], mask=inside, other=0)
        weight, highest = jnp.where(first, 1.0, weight), jnp.where(first, logit, highest)
    sums = jnp.zeros((block, lane.shape[1]), jnp.float32), weight, highest
    if window is not None:
        sums = jax.lax.fori_loop(0, plan.plain_first, partial(add, masked=True), sums)
    sums = jax.lax.fori_loop(plan.plain_first, plan.plain_end, partial(add, masked=False), sums)
    values, weight, highest = jax.lax.fori_loop(plan.plain_end, plan.number, partial(add, masked=True), sums)

    if splits == 1:
        values = jnp.where(real[:, None], values / weight[:, None], 0)
    else:
        plgpu.store(weight_ref.at[b, t, n, split], weight, mask=inside)
        plgpu.store(highest_ref.at[b, t, n, split], highest, mask=inside)
    at = b, t[:, None], n[:, None], split, lane
    plgpu.store(values_ref.at[at], values.astype(values_ref.dtype), mask=inside[:, None] & (lane < value_dim))
