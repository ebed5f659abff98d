"""CPU: a loop over large blocks that need no mask, one group at a time, then one over small blocks of all groups.

The pages that a group sees are cut into small blocks at both edges, where some row may not see all of a block, and
large ones between them. The cut follows from the group's own positions, so the numbers of a group do not depend on
what others are computed beside it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from emoe_jax.attention.operands import Operands
from emoe_jax.attention.pages import KVView
from emoe_jax.attention.sums import AttentionSums
from emoe_jax.scheduling.pages import PAGE_SIZE

SMALL = 8
"""Pages of a small block. On CPU 4 and 16 take 10 to 60 % longer at contexts of about a hundred tokens."""
LARGE = 32
"""Pages of a large block: enough for the compiler to use several threads, and scores that stay in a core's cache."""
FEW_PAGES = 64
"""Block tables of so many pages are read in small blocks only: large ones pay for longer contexts, and every step would
take longer to compile."""
TILE = 128
"""Rows of a tile. Longer chunks are cut into tiles, each of which walks its own context."""

_Carried = tuple[AttentionSums, tuple[Array, ...]]


def blocks(operands: Operands) -> Float[Array, "B T N Hv"]:
    """Cost follows the contexts at hand: of each group in the large blocks, of the longest edge in the small ones.

    A block that a row does not see leaves its sums as they are, bit for bit.
    """
    q, _, view, *_ = operands
    B, T, N, _ = q.shape
    if T <= TILE:
        return _attend(operands)
    number = -(-T // TILE)
    padding = ((0, 0), (0, number * TILE - T))
    tiles = KVView(
        jnp.pad(view.positions, padding).reshape(-1, TILE),
        jnp.pad(view.valid, padding).reshape(-1, TILE),
        jnp.repeat(view.block_tables, number, axis=0),
    )
    queries = jnp.pad(q, (*padding, (0, 0), (0, 0))).reshape(-1, TILE, *q.shape[2:])
    return _attend(operands._replace(q=queries, view=tiles)).reshape(B, number * TILE, N, -1)[:, :T]


class Cut(NamedTuple):
    """By group: its pages from `first` on are `left` small blocks, `large` large ones, and `right` small ones."""

    first: Int[Array, " B"]
    left: Int[Array, " B"]
    large: Int[Array, " B"]
    right: Int[Array, " B"]

    @classmethod
    def of(cls, view: KVView, window: int | None) -> "Cut":
        """Large blocks hold only positions that every row of the group sees. A group of padding has no blocks."""
        highest = jnp.max(jnp.where(view.valid, view.positions, -1), axis=1)
        lowest = jnp.min(jnp.where(view.valid, view.positions, highest[:, None]), axis=1)
        oldest = shared = jnp.zeros_like(highest)  # the first position that any row sees, and that every row sees
        if window is not None:
            oldest, shared = jnp.maximum(lowest - window + 1, 0), jnp.maximum(highest - window + 1, 0)
        first, end = oldest // PAGE_SIZE, highest // PAGE_SIZE + 1
        left = -(-(-(-shared // PAGE_SIZE) - first) // SMALL)
        large = jnp.maximum((lowest + 1) // PAGE_SIZE - (first + left * SMALL), 0) // LARGE
        if view.block_tables.shape[1] <= FEW_PAGES:
            large = jnp.zeros_like(large)
        left = jnp.where(large > 0, left, 0)
        right = -(-(end - first - left * SMALL - large * LARGE) // SMALL)
        return cls(first, left, large, right)


def _attend(operands: Operands) -> Float[Array, "B T N Hv"]:
    q, cache, view, sinks, window, _ = operands
    sums = AttentionSums.zero(q, cache.kv_heads, cache.value_dim)
    cut = Cut.of(view, window)
    if view.block_tables.shape[1] > FEW_PAGES:
        sums = _add_large(sums, operands, cut)
    sums = _add_small(sums, operands, cut)
    return jnp.where(view.valid[:, :, None, None], sums.output(q.dtype, sinks), 0)


def _add_large(sums: AttentionSums, operands: Operands, cut: Cut) -> AttentionSums:
    """With the large blocks of all groups, one after the other."""
    q, cache, view, _, _, scale = operands
    B, T, _, H = q.shape
    K = cache.kv_heads
    queries = (q.astype(jnp.float32) * scale).reshape(B, T, K, -1, H).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, H)
    ends = jnp.cumsum(cut.large)
    start = cut.first + cut.left * SMALL

    def add(item: Array, carried: _Carried) -> _Carried:
        b = jnp.sum(item >= ends)
        at = start[b] + (item - (ends[b] - cut.large[b])) * LARGE
        rows = cache.rows(jax.lax.dynamic_slice(view.block_tables, (b, at), (1, LARGE)))
        k, v = (x[0] for x in cache.split(tuple(x.astype(jnp.float32) for x in rows), 1))
        own, own_queries = jax.tree.map(
            lambda x: jax.lax.dynamic_index_in_dim(x, b, keepdims=False), (carried[0], queries)
        )
        added = _with_seen(own, own_queries, k, v)
        return jax.tree.map(
            lambda whole, one: jax.lax.dynamic_update_index_in_dim(whole, one, b, 0), carried[0], added
        ), rows

    def loop(flat: AttentionSums) -> AttentionSums:
        # The loop hands on the rows, though no iteration reads those of the one before: XLA then copies them as they
        # are. Else it makes them one with a reshape, and the copy takes twice as long.
        kept = (cache.k,) if cache.v is None else (cache.k, cache.v)
        rows = tuple(jnp.zeros((K * LARGE, PAGE_SIZE * H), x.dtype) for x in kept)
        flat, rows = jax.lax.fori_loop(0, ends[-1], add, (flat, rows))
        never = ends[-1] < 0
        read = [jnp.where(never, x[0, 0].astype(jnp.float32), flat.weight) for x in rows]
        return flat._replace(weight=jnp.where(never, read[0], read[-1]))

    flat = jax.tree.map(lambda x: x.reshape(*queries.shape[:3], *x.shape[4:]), sums)
    flat = jax.lax.cond(ends[-1] > 0, loop, lambda flat: flat, flat)
    return jax.tree.map(lambda x, like: x.reshape(like.shape), flat, sums)


def _with_seen(
    sums: AttentionSums, q: Float[Array, "K Q H"], k: Float[Array, "K S H"], v: Float[Array, "K S Hv"]
) -> AttentionSums:
    """The sums of one group with `S` more positions that all its rows see."""
    scores = jnp.einsum("KQH,KSH->KQS", q, k)
    highest = jnp.maximum(sums.highest, jnp.max(scores, axis=-1))
    powers = jnp.exp(scores - highest[..., None])
    kept = jnp.exp(sums.highest - highest)
    weight = sums.weight * kept + jnp.sum(powers, axis=-1)
    added = jnp.einsum("KQS,KSH->KQH", powers, v)
    return AttentionSums(highest, weight, sums.values * kept[..., None] + added)


def _add_small(sums: AttentionSums, operands: Operands, cut: Cut) -> AttentionSums:
    """With the small blocks, the first of all groups side by side, then the second."""
    q, cache, view, _, window, scale = operands
    size = SMALL * PAGE_SIZE
    tables = jnp.pad(view.block_tables, ((0, 0), (0, SMALL)))
    queries = q.astype(jnp.float32)

    def add(index: Array, sums: AttentionSums) -> AttentionSums:
        skipped = jnp.where(index < cut.left, 0, cut.large * LARGE)
        at = jnp.minimum(cut.first + index * SMALL + skipped, view.block_tables.shape[1])
        named = jnp.take_along_axis(tables, at[:, None] + jnp.arange(SMALL, dtype=jnp.int32)[None], axis=1)
        k, v = (x.astype(jnp.float32).transpose(0, 2, 1, 3) for x in cache.gather(named))
        positions = at[:, None] * PAGE_SIZE + jnp.arange(size, dtype=jnp.int32)[None]
        distance = view.positions[:, :, None] - positions[:, None, :]
        mask = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        return sums.add(queries, k, v, mask, scale)

    return jax.lax.fori_loop(0, jnp.max(cut.left + cut.right), add, sums)
