"""A priority queue from which any member can leave."""

import heapq
import math
from collections.abc import Iterator

from emoe_jax.requests.sequence import Sequence


class Ranking:
    """Sequences by rank, lowest first, equal ranks by arrival. Changes take O(log n): entries of those that left stay
    until they come first.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, int, Sequence]] = []
        self._entries: dict[Sequence, int] = {}  # the number of the entry that counts
        self._next = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._entries

    def add(self, sequence: Sequence, rank: float) -> None:
        """Rank a sequence, in place of the rank that it had."""
        self._next += 1
        self._entries[sequence] = self._next
        heapq.heappush(self._heap, (rank, sequence.order, self._next, sequence))

    def discard(self, sequence: Sequence) -> None:
        """Forget a sequence; nothing happens when it has no rank."""
        if self._entries.pop(sequence, None) is not None and len(self._heap) > 2 * len(self._entries) + 16:
            self._heap = [entry for entry in self._heap if self._entries.get(entry[3]) == entry[2]]
            heapq.heapify(self._heap)

    def first(self) -> Sequence | None:
        """The sequence of the lowest rank."""
        heap, entries = self._heap, self._entries
        while heap:
            _, _, number, sequence = heap[0]
            if entries.get(sequence) == number:
                return sequence
            heapq.heappop(heap)
        return None

    def ascending(self) -> Iterator[tuple[float, Sequence]]:
        """Ranks and sequences, the lowest first; each takes O(log n). Not while the ranking changes."""
        self.first()  # forgets those that left and would come before it
        heap = self._heap
        ahead = [(heap[0], 0)] if heap else []  # entries whose parent was seen, and where they are in the heap
        while ahead:
            (rank, _, number, sequence), index = heapq.heappop(ahead)
            if self._entries.get(sequence) == number:
                yield rank, sequence
            for child in range(2 * index + 1, min(2 * index + 3, len(heap))):
                heapq.heappush(ahead, (heap[child], child))

    def first_rank(self) -> float:
        """The lowest rank; infinite when there is none."""
        return self._heap[0][0] if self.first() is not None else math.inf
