"""Which pages each program of the GPU kernel reads: pure functions of positions, so that tests can count.

A program attends for one query block (some rows of a group) and one kv head to one of `splits` parts of the pages that
the block sees. It reads them in strides of a few pages, each page once.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp

from emoe_jax.scheduling.pages import PAGE_SIZE

Integer = Any
"""A Python integer, or an integer of JAX without axes."""

_PROGRAMS = 256
"""Programs that fill a large GPU, about two per multiprocessor."""
_MIN_PART_PAGES = 16
"""Pages below which a part of a context is not worth a program and its partial sums."""
_MAX_PART_PAGES = 256
_MAX_SPLITS = 64


class Strides(NamedTuple):
    """The pages `[first, end)` of one program, in strides of `width` pages: stride `i` begins at `first + i * width`.

    Strides `[plain_first, plain_end)` hold only positions that every row of the query block sees and need no mask.
    """

    first: Integer
    end: Integer
    plain_first: Integer
    plain_end: Integer
    number: Integer


def strides(lowest: Integer, highest: Integer, window: int | None, split: Integer, splits: int, width: int) -> Strides:
    """The pages that part `split` of a query block reads, for rows at positions from `lowest` to `highest`.

    No stride where `highest` is -1: the block is padding.
    """
    oldest, shared = 0, 0  # the first position that any row sees, and that every row sees
    if window is not None:
        oldest, shared = jnp.maximum(lowest - window + 1, 0), jnp.maximum(highest - window + 1, 0)
    begin, stop = oldest // PAGE_SIZE, (highest + PAGE_SIZE) // PAGE_SIZE
    share = _ceil_div(_ceil_div(jnp.maximum(stop - begin, 0), splits), width) * width
    first = jnp.minimum(begin + split * share, stop)
    end = jnp.minimum(first + share, stop)
    number = _ceil_div(jnp.maximum(end - first, 0), width)
    plain_first = jnp.clip(_ceil_div(_ceil_div(shared, PAGE_SIZE) - first, width), 0, number)
    plain_end = jnp.clip((jnp.minimum((lowest + 1) // PAGE_SIZE, end) - first) // width, plain_first, number)
    return Strides(first, end, plain_first, plain_end, number)


def number_of_splits(blocks: int, pages_per_sequence: int, decoding: bool) -> int:
    """Into how many parts the context of each of `blocks` query blocks is cut: a power of 2.

    As many as fill a GPU. Of decoding rows a part is also short enough that one long row does not keep a whole batch
    waiting. A part that a short row does not have costs a program that reads nothing.
    """
    wanted = min(_PROGRAMS // max(blocks, 1), pages_per_sequence // _MIN_PART_PAGES)
    if decoding:
        wanted = max(wanted, pages_per_sequence // _MAX_PART_PAGES)
    return 1 << (min(max(wanted, 1), _MAX_SPLITS).bit_length() - 1)


def _ceil_div(number: Integer, by: int) -> Integer:
    """Rounded up; `number` may be negative."""
    return -(-number // by)
