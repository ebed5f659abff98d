"""The block tables of running sequences as arrays, kept from step to step."""

from collections.abc import Sequence as Rows

import numpy as np
from jaxtyping import Int32

from emoe_jax.requests.sequence import Sequence


class _Row:
    """The pages of one sequence, as far as they have been written down."""

    def __init__(self, pages: list[int], width: int):
        self.pages = pages
        self.known = 0
        self.table = np.zeros(width, np.int32)


class BlockTables:
    """Turns the page lists of sequences into rows of block tables. A page is converted once, not at every step.

    A page list only grows. Whoever takes pages away or moves them gives the sequence another list: that is how a row
    that is out of date is found.
    """

    def __init__(self, width: int):
        """`width`: pages of the longest sequence."""
        self._width = width
        self._rows: dict[Sequence, _Row] = {}

    def copy(self, sequences: Rows[Sequence], tables: Int32[np.ndarray, "B pages_per_sequence"]) -> None:
        """Write the tables of these sequences, in order, to the first rows of `tables`."""
        for place, sequence in enumerate(sequences):
            tables[place] = self._row(sequence)
        if len(self._rows) > 2 * max(len(sequences), len(tables)):
            self._rows = {sequence: row for sequence, row in self._rows.items() if not sequence.finished}

    def _row(self, sequence: Sequence) -> Int32[np.ndarray, " pages_per_sequence"]:
        row = self._rows.get(sequence)
        if row is None or row.pages is not sequence.pages:
            row = self._rows[sequence] = _Row(sequence.pages, self._width)
        if row.known < len(row.pages):
            row.table[row.known : len(row.pages)] = row.pages[row.known :]
            row.known = len(row.pages)
        return row.table
