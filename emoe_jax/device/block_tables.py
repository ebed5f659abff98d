"""The block tables of running sequences: sent with each batch, or kept on the device, which is told what is new.

A page list only grows. Whoever takes pages away or moves them gives the sequence another list: that is how a table that
is out of date is found.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence as Rows
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32

from emoe_jax.device.packing import Packing
from emoe_jax.device.shapes import Buckets, Shape
from emoe_jax.requests.sequence import Sequence
from emoe_jax.scheduling.pages import PAGE_SIZE

WRITTEN_AT_ONCE = 1024
"""Pages that one call puts in the tables, where a batch brings more than those that its tokens may fill."""


class NewPages(NamedTuple):
    """Pages that tables on the device get. Entries that pad have row -1."""

    rows: Int32[Any, " n"]
    columns: Int32[Any, " n"]
    pages: Int32[Any, " n"]

    @staticmethod
    @functools.cache
    def packing(room: int) -> Packing:
        """How `room` entries lie in one buffer."""
        return Packing(**dict.fromkeys(NewPages._fields, ((room,), np.int32)))

    @classmethod
    def pack(cls, entries: Rows[tuple[int, int, int]], room: int) -> Int32[np.ndarray, " words"]:
        """The buffer for these entries."""
        buffer = cls.packing(room).empty()
        arrays = cls(**cls.packing(room).views(buffer))
        arrays.rows[:] = -1
        if entries:
            for array, values in zip(arrays, zip(*entries, strict=True), strict=True):
                array[: len(entries)] = values
        return buffer

    @staticmethod
    def room(shape: Shape) -> int:
        """Entries that go with a batch of a shape: two pages of each sequence, and those that its prompts fill."""
        return 2 * shape.sequences + -(-shape.tiles * shape.tile // PAGE_SIZE)


class TableUpdate(NamedTuple):
    """What tables on the device are told for a batch."""

    rows: Int32[np.ndarray, " B"]
    """By place: where the sequence's table is."""
    lengths: Int32[np.ndarray, " B"]
    """By place: how many pages of it are the sequence's, now. What comes after them is somebody else's, or newer."""
    new: Int32[np.ndarray, " words"]
    """`NewPages`, packed."""
    before: tuple[Int32[np.ndarray, " words"], ...] = ()
    """Further ones of `WRITTEN_AT_ONCE` entries, which come first."""

    @classmethod
    def of(cls, rows: Rows[int], lengths: Rows[int], entries: Rows[tuple[int, int, int]], shape: Shape) -> TableUpdate:
        """For sequences in the first places. The others have no pages."""
        padded = np.zeros((2, shape.sequences), np.int32)
        padded[:, : len(rows)] = rows, lengths
        room = NewPages.room(shape)
        first = range(0, max(0, len(entries) - room), WRITTEN_AT_ONCE)
        before = tuple(NewPages.pack(entries[at : at + WRITTEN_AT_ONCE], WRITTEN_AT_ONCE) for at in first)
        return cls(padded[0], padded[1], NewPages.pack(entries[WRITTEN_AT_ONCE * len(before) :], room), before)

    @classmethod
    def of_padding(cls, shape: Shape) -> TableUpdate:
        """For a batch of nothing else, which warms up: it brings no pages, in as many pieces as a large update."""
        return cls.of([], [], [(-1, 0, 0)] * (NewPages.room(shape) + 1), shape)


class _Known:
    """The pages of one sequence, as far as they have been written down."""

    def __init__(self, pages: list[int], table: Int32[np.ndarray, " pages_per_sequence"]):
        self.pages = pages
        self.count = 0
        self.table = table


class SentTables:
    """Writes the page lists of sequences to each batch. A page is converted once, not at every step."""

    def __init__(self, width: int):
        """`width`: pages of the longest sequence."""
        self._width = width
        self._known: dict[Sequence, _Known] = {}

    def begin_plan(self) -> None:
        """Nothing depends on it."""

    def forget(self) -> None:
        """Nothing is kept but here."""

    def place(self, sequences: Rows[Sequence], shape: Shape, tables: Int32[np.ndarray, "B pages_per_sequence"]) -> None:
        """Write the tables of these sequences, in order, to the first rows of `tables`."""
        for place, sequence in enumerate(sequences):
            tables[place] = self._table(sequence)
        if len(self._known) > 2 * max(len(sequences), len(tables)):
            self._known = {sequence: known for sequence, known in self._known.items() if not sequence.finished}

    def _table(self, sequence: Sequence) -> Int32[np.ndarray, " pages_per_sequence"]:
        known = self._known.get(sequence)
        if known is None or known.pages is not sequence.pages:
            known = self._known[sequence] = _Known(sequence.pages, np.zeros(self._width, np.int32))
        if known.count < len(known.pages):
            known.table[known.count : len(known.pages)] = known.pages[known.count :]
            known.count = len(known.pages)
        return known.table


class _Row:
    """A row of the tables on the device."""

    def __init__(self, number: int):
        self.number = number
        self.sequence: Sequence | None = None
        self.pages: list[int] | None = None
        self.known = 0
        self.used = -2
        """The last plan that reads it."""


class DeviceTables:
    """Says which row of the tables on the device each sequence has, and which pages the device does not know yet.

    A plan may be computed again while the one after it is on the device, so that a row goes to another sequence
    only when neither the newest plan nor the one before it reads it. A row never changes but by growing.
    """

    def __init__(self, count: int):
        """`count` rows: one for each sequence of two plans."""
        self._rows = [_Row(number) for number in range(count)]
        self._of: dict[Sequence, _Row] = {}
        self._plan = 0

    def begin_plan(self) -> None:
        """What is placed from now on belongs to another plan."""
        self._plan += 1

    def forget(self) -> None:
        """The device may not have got what it was told: give sequences other rows."""
        self._of.clear()

    def place(
        self, sequences: Rows[Sequence], shape: Shape, tables: Int32[np.ndarray, "B pages_per_sequence"]
    ) -> TableUpdate:
        """What the device is told for these sequences, in order. Nothing is written to `tables`."""
        entries: list[tuple[int, int, int]] = []
        numbers = []
        for sequence in sequences:
            row = self._row(sequence)
            row.used = self._plan
            pages = sequence.pages[row.known :]
            entries += [(row.number, column, page) for column, page in enumerate(pages, row.known)]
            row.known += len(pages)
            numbers.append(row.number)
        return TableUpdate.of(numbers, [len(sequence.pages) for sequence in sequences], entries, shape)

    def _row(self, sequence: Sequence) -> _Row:
        row = self._of.get(sequence)
        if row is None or row.pages is not sequence.pages:
            row = min(self._rows, key=lambda row: row.used)
            assert row.used < self._plan - 1, "there are rows for two plans"
            if row.sequence is not None and self._of.get(row.sequence) is row:
                del self._of[row.sequence]
            row.sequence, row.pages, row.known = sequence, sequence.pages, 0
            self._of[sequence] = row
        return row


BlockTables = SentTables | DeviceTables


def tables_of(buckets: Buckets) -> BlockTables:
    """The kind of block tables that an engine with these shapes has."""
    return DeviceTables(buckets.kept_tables) if buckets.keeps_tables else SentTables(buckets.pages)


def blank_tables(buckets: Buckets) -> Int32[np.ndarray, "tables pages_per_sequence"]:
    """What an engine keeps on the device at first."""
    return np.zeros((buckets.kept_tables, buckets.pages), np.int32)
