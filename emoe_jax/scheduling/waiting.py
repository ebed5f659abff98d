"""The queue of the `slo` policy: the same sequences by arrival, by deadline and by work."""

import math
from collections import OrderedDict
from collections.abc import Container, Iterator
from typing import NamedTuple

from emoe_jax.requests.sequence import Sequence
from emoe_jax.scheduling.ranking import Ranking

MAX_TASKS = 64
"""Tasks that are ranked apart; clients may make up names."""


class _Entry(NamedTuple):
    since: float
    by_work: Ranking


class WaitingQueue:
    """Sequences that wait, in O(log n) per change. `late` are those whose deadlines cannot be kept any more."""

    def __init__(self) -> None:
        self._entries: OrderedDict[Sequence, _Entry] = OrderedDict()  # by arrival
        self._due = Ranking()
        self._by_work: dict[str | None, Ranking] = {}
        self._late = Ranking()

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Sequence]:
        """By arrival; those put first, first."""
        return iter(self._entries)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._entries

    def add(self, sequence: Sequence, latest_start: float, work: float) -> None:
        """A sequence waits, since its arrival. `latest_start` (seconds) is infinite when nothing is due."""
        entry = self._entries[sequence] = _Entry(sequence.arrival, self._ranking(sequence.task))
        entry.by_work.add(sequence, work)
        if latest_start < math.inf:
            self._due.add(sequence, latest_start)

    def add_first(self, sequence: Sequence) -> None:
        """A sequence waits that is to start before all others."""
        self._entries[sequence] = _Entry(-math.inf, self._ranking(sequence.task))
        self._entries.move_to_end(sequence, last=False)

    def remove(self, sequence: Sequence) -> None:
        """Raises `KeyError` when it does not wait."""
        self._entries.pop(sequence).by_work.discard(sequence)
        self._due.discard(sequence)
        self._late.discard(sequence)

    def defer(self, sequence: Sequence, work: float) -> None:
        """Its deadlines cannot be kept: it goes among the late ones."""
        self._due.discard(sequence)
        self._entries[sequence].by_work.discard(sequence)
        self._late.add(sequence, work)

    def postpone(self, sequence: Sequence, latest_start: float) -> None:
        """It need not start before `latest_start` (seconds) after all."""
        self._due.add(sequence, latest_start)

    @property
    def num_late(self) -> int:
        """Waiting sequences whose deadlines can no longer be kept."""
        return len(self._late)

    def oldest(self, but: Container[Sequence] = ()) -> tuple[Sequence, float]:
        """The first by arrival `but` for some, and since when (seconds) it waits. There is one."""
        sequence = next(sequence for sequence in self._entries if sequence not in but)
        return sequence, self._entries[sequence].since

    def most_urgent(self) -> tuple[Sequence | None, float]:
        """The one that must start first, and when (seconds); infinite when nothing is due."""
        return self._due.first(), self._due.first_rank()

    def by_work(self) -> Iterator[Iterator[tuple[float, Sequence]]]:
        """For each task its waiting sequences, with their work, the least work first. Late ones are left out."""
        return (ranking.ascending() for ranking in self._by_work.values() if len(ranking))

    def late(self) -> Iterator[Sequence]:
        """Those whose deadlines cannot be kept, the least work first."""
        return (sequence for _, sequence in self._late.ascending())

    def _ranking(self, task: str | None) -> Ranking:
        if task not in self._by_work and len(self._by_work) >= MAX_TASKS:
            task = None
        return self._by_work.setdefault(task, Ranking())
