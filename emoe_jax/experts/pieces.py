"""How large records are cut, so that an expert on its way to the slab takes little of the device."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from emoe_jax.experts.record_format import RecordArray, RecordFormat

PIECE_BYTES = 32 << 20
"""The most that one transfer and one write take. Smaller records are moved as a whole."""

ROUND_PIECES = 4
"""Pieces of one expert that are staged together. A commit writes one such round of each expert, so more of them make
loads faster between steps, and take more of the device."""

_WINDOW_BYTES = 64 << 20

# A flat record of as many numbers as its format says, in numpy memory or in pinned host memory; pinned, a large one is
# a tuple of its pieces, because nothing can be cut out of an array there. Never written again once published.
HostRecord = np.ndarray | jax.Array | tuple[jax.Array, ...]


class Piece(NamedTuple):
    """Rows of one of a record's arrays."""

    part: int
    """Which array of the format it is of."""
    row: int
    """The first of its rows."""
    rows: int
    numbers: slice
    """Where in the flat record they are."""


class Rounds:
    """The pieces of a record in the order in which they are staged and written, some at a time.

    All pieces of a part have the same number of rows, so that one executable writes them: the last one may begin with
    rows that the one before ends with. A record of at most `piece_bytes` has one round, and no pieces.
    """

    def __init__(self, record_format: RecordFormat, piece_bytes: int = PIECE_BYTES):
        self._piece_bytes = piece_bytes
        self.pieces: tuple[Piece, ...] = ()
        """Of all rounds; none where records are moved as a whole."""
        if record_format.nbytes > piece_bytes:
            itemsize, starts = record_format.dtype.itemsize, [0]
            for array in record_format.arrays:
                starts.append(starts[-1] + array.nbytes // itemsize)
            self.pieces = tuple(
                piece
                for part, array in enumerate(record_format.arrays)
                for piece in _pieces(part, starts[part], array, itemsize, piece_bytes)
            )

    def __len__(self) -> int:
        return max(1, -(-len(self.pieces) // ROUND_PIECES))

    def __getitem__(self, number: int) -> tuple[Piece, ...]:
        """The pieces of one round."""
        return self.pieces[number * ROUND_PIECES : (number + 1) * ROUND_PIECES]

    def cut(self, record: np.ndarray) -> list[np.ndarray]:
        """A flat record as its pieces, which are views; or the record alone, where it is moved as a whole."""
        return [record[piece.numbers] for piece in self.pieces] if self.pieces else [record]

    def of(self, number: int, record: HostRecord) -> Sequence[np.ndarray | jax.Array]:
        """What one round transfers of a record."""
        if not self.pieces:
            return record if isinstance(record, tuple) else (record,)
        first, last = number * ROUND_PIECES, (number + 1) * ROUND_PIECES
        if isinstance(record, tuple):
            return record[first:last]
        return [record[piece.numbers] for piece in self[number]]


def _pieces(part: int, first: int, array: RecordArray, itemsize: int, most: int) -> list[Piece]:
    """An array's rows in as few equal pieces as there can be. `first` is where it begins in the record, in numbers of
    `itemsize` bytes."""
    count = array.shape[0]
    width = array.nbytes // count // itemsize  # of a row
    rows = max(1, most // (width * itemsize))
    rows = -(-count // -(-count // rows))
    starts = [min(start, count - rows) for start in range(0, count, rows)]
    return [Piece(part, row, rows, slice(first + row * width, first + (row + rows) * width)) for row in starts]


def round_bytes(record_bytes: int) -> int:
    """The most that one round of a record takes."""
    return record_bytes if record_bytes <= PIECE_BYTES else min(record_bytes, ROUND_PIECES * PIECE_BYTES)


def default_window(record_bytes: int) -> int:
    """Rounds that are held between store and slab by default. A small record is one round."""
    if record_bytes <= PIECE_BYTES:
        return min(max(_WINDOW_BYTES // record_bytes, 4), 32)
    return max(1, ROUND_PIECES * PIECE_BYTES // round_bytes(record_bytes))


def staged_ahead(window: int) -> int:
    """Rounds that `load_now` stages beside the window, while as many again are being written."""
    return max(1, window // 2)


def staging_bytes(record_bytes: int) -> int:
    """The most that experts on their way to the slab take on the device, `load_now` running.

    Worked example: an expert of Mixtral-8x7B has 352 MB, and staging takes 403 MB: twelve pieces of 32 MiB.
    """
    window = default_window(record_bytes)
    return (window + 2 * staged_ahead(window)) * round_bytes(record_bytes)
