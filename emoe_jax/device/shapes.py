"""The few shapes that batches are padded to, so that the engine compiles them all before it serves."""

import dataclasses
from collections.abc import Sequence as Rows
from typing import NamedTuple

from emoe_jax.platforms import default_platform
from emoe_jax.scheduling.pages import pages_for

TILE = 32
"""Rows of a tile: so many tokens of one prompt, or fewer and padding."""

LARGE_TILE = 128
"""Rows of a tile in the largest batches on a CPU, where tiles attend one by one."""

MOST_SMALL_TILES = 8
"""Batches of more tiles than these have large tiles on a CPU."""


class Shape(NamedTuple):
    """A flat batch: first the decoding rows, then tiles of the rows of prompts.

    A sequence has a place below `sequences`. One that decodes has the row of its place; one whose prompt is read has
    as many tiles as its chunk needs, one after another. `decodes` is `sequences`, or 0 where no sequence can decode.
    """

    sequences: int
    decodes: int
    tiles: int
    tile: int
    """Rows of a tile."""
    pages: int
    """The width of a block table."""

    @property
    def rows(self) -> int:
        """All rows, those of padding included."""
        return self.decodes + self.tiles * self.tile

    @property
    def groups(self) -> int:
        """Decoding rows and tiles."""
        return self.decodes + self.tiles


LARGE_TABLES = 2**14
"""Pages in the block tables of a full batch, beyond which the tables are kept on the device: 64 kB."""
PLANS_KEPT = 3
"""Plans whose sampled tokens are on the device."""


@dataclasses.dataclass(frozen=True)
class Buckets:
    """The shapes of an engine. Without prompts a batch has as many decoding rows as it needs, else room for all.

    Block tables always have room for the longest sequence: attention goes no further than it must.
    """

    sequences: tuple[int, ...]
    tiles: tuple[tuple[int, int], ...]
    """How many tiles of how many rows, from the fewest rows to the most."""
    pages: int

    @classmethod
    def of(cls, max_num_seqs: int, prefill_chunk: int, max_model_len: int, platform: str | None = None) -> "Buckets":
        """The buckets of an engine's limits. `prefill_chunk` and `max_model_len` are in tokens."""
        tile = min(TILE, prefill_chunk)
        large = LARGE_TILE if (platform or default_platform()) == "cpu" else tile
        counts = _ladder(-(-prefill_chunk // tile))
        return cls(
            sequences=_ladder(max_num_seqs),
            tiles=tuple(
                (count, tile) if count <= MOST_SMALL_TILES else (-(-count * tile // large), large) for count in counts
            ),
            pages=pages_for(max_model_len),
        )

    @property
    def token_places(self) -> int:
        """Where sampled tokens are kept on the device: those of the last three plans.

        A plan reads those of the plan before it, and may be computed again after the one behind it has written its own.
        """
        return PLANS_KEPT * self.sequences[-1]

    @property
    def kept_tables(self) -> int:
        """Block tables that are kept on the device: one for each sequence of two plans."""
        return 2 * self.sequences[-1]

    @property
    def table_bytes(self) -> int:
        """Of the block tables on the device."""
        return 4 * self.kept_tables * self.pages if self.keeps_tables else 0

    @property
    def keeps_tables(self) -> bool:
        """Whether block tables are kept on the device, because sending them with every batch takes long."""
        return self.sequences[-1] * self.pages > LARGE_TABLES

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """All shapes that there are, those without prompts first. The engine compiles each of them."""
        without = [self.fit(count) for count in self.sequences]
        return (*without, *(self._with_tiles(*tiles) for tiles in self.tiles))

    def fit(self, sequences: int, chunks: Rows[int] = ()) -> Shape:
        """The smallest shape that holds so many sequences, and prompts' chunks of so many tokens.

        Raises `ValueError` where there is none.
        """
        if not chunks:
            count = next(bucket for bucket in self.sequences if bucket >= sequences)
            return Shape(count, count, 0, TILE, self.pages)
        for count, tile in self.tiles:
            if sum(-(-length // tile) for length in chunks) <= count:
                return self._with_tiles(count, tile)
        raise ValueError(f"chunks of {list(chunks)} tokens do not fit one batch")

    def fits(self, chunks: Rows[int]) -> bool:
        """Whether one batch holds chunks of so many tokens."""
        return any(sum(-(-length // tile) for length in chunks) <= count for count, tile in self.tiles)

    def _with_tiles(self, count: int, tile: int) -> Shape:
        most = self.sequences[-1]
        return Shape(most, most, count, tile, self.pages)


def _ladder(last: int) -> tuple[int, ...]:
    """1, then twice as much each time below `last`, then `last`."""
    sizes = []
    size = 1
    while size < last:
        sizes.append(size)
        size *= 2
    return (*sizes, last)
