"""The order in which a GPU reads experts: blocks of assignments that never mix experts."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

from emoe_jax.moe.dispatch import Dispatch


class RowBlocks(NamedTuple):
    """Block `b` has sorted assignments `start[b] : start[b] + size[b]`, which all have the expert at `slot[b]`.

    Blocks come in ascending order of the experts; those behind the last one have size 0. A kernel reads the weights
    of a slot once per block, so it reads an expert once if the expert's assignments fit one block, and an expert
    without assignments never.

    Worked example, blocks of 16, sizes [20, 0, 3]: start [0, 16, 20], size [16, 4, 3].
    """

    start: Int[Array, " blocks"]
    size: Int[Array, " blocks"]
    slot: Int[Array, " blocks"]

    @classmethod
    def of(cls, groups: Dispatch, rows: int) -> "RowBlocks":
        """Blocks of up to `rows` assignments, as many as any routing can need."""
        A, E = groups.order.shape[0], groups.size.shape[0]
        number = (groups.size + rows - 1) // rows
        experts = jnp.arange(E, dtype=jnp.int32)
        # Sums over comparisons: a cumulative sum and a search would be loops.
        end = jnp.sum(jnp.where(experts[None, :] <= experts[:, None], number[None, :], 0), axis=1, dtype=jnp.int32)
        b = jnp.arange(most_blocks(A, E, rows), dtype=jnp.int32)
        expert = jnp.sum(end[None, :] <= b[:, None], axis=1, dtype=jnp.int32)
        expert = jnp.minimum(expert, E - 1)
        done = (b - (end - number)[expert]) * rows
        size = jnp.where(b < end[-1], jnp.clip(groups.size[expert] - done, 0, rows), 0)
        start = jnp.where(size > 0, groups.start[expert] + done, 0)
        return cls(start, size, groups.slot[start])


def most_blocks(assignments: int, num_experts: int, rows: int) -> int:
    """Blocks for the worst routing: every expert has a block with one assignment, the others fill whole blocks."""
    busy = min(assignments, num_experts)
    return busy + (assignments - busy) // rows
