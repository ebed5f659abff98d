"""The records that are kept in host memory: first of all those of experts that are not on the device."""

from collections import OrderedDict, deque
from collections.abc import Iterable

import numpy as np
from jaxtyping import Bool

from emoe_jax.experts.pieces import HostRecord

ExpertKey = tuple[int, int]
"""MoE layer and expert."""


class HostTier:
    """At most `most` records. Not thread-safe: the store locks it.

    A record of an expert that is on the device is a spare: it goes before all others, and gives its place to that of
    the expert which was evicted. Of spares, and of others where there are none, the least recently used one goes first.
    """

    def __init__(self, most: int, num_layers: int, num_experts: int):
        self.most = most
        self.resident: Bool[np.ndarray, "M E"] = np.zeros((num_layers, num_experts), bool)
        """Which experts are on the device, as far as it was told."""
        self._spares: OrderedDict[ExpertKey, HostRecord] = OrderedDict()  # both: least recently used first
        self._needed: OrderedDict[ExpertKey, HostRecord] = OrderedDict()
        self._evicted: dict[ExpertKey, None] = {}  # oldest first
        self._order: deque[ExpertKey] = deque()

    def __len__(self) -> int:
        return len(self._spares) + len(self._needed)

    def __contains__(self, key: ExpertKey) -> bool:
        return key in self._spares or key in self._needed

    def get(self, key: ExpertKey) -> HostRecord | None:
        """The record, which counts as used now."""
        records = self._records(key)
        record = records.get(key)
        if record is not None:
            records.move_to_end(key)
        return record

    def keep(self, key: ExpertKey, record: HostRecord) -> int:
        """Add a record, used now. Returns how many went for it, itself perhaps."""
        self._records(key)[key] = record
        gone = 0
        while len(self) > self.most:
            (self._spares or self._needed).popitem(last=False)
            gone += 1
        return gone

    def use_residents(self, resident: Bool[np.ndarray, "M E"]) -> None:
        """These experts are on the device from now on, and others are not. The array must not change any more."""
        layers, experts = np.nonzero(resident != self.resident)
        self.resident = resident
        for key in zip(layers.tolist(), experts.tolist(), strict=True):
            before = self._needed if resident[key] else self._spares
            if key in before:
                self._records(key)[key] = before.pop(key)
            elif not resident[key]:
                self._evicted[key] = None

    def fill(self, order: Iterable[ExpertKey]) -> None:
        """Want these records, in this order, as far as there is room."""
        self._order = deque(order)

    def next_wanted(self, coming: int = 0) -> ExpertKey | None:
        """A record to be read in the background, each once: of the experts that left the device the oldest, then the
        next in order. None where there is none, or no room beside those that are `coming` without giving up another
        that is needed.
        """
        while self._evicted or self._order:
            key = next(iter(self._evicted)) if self._evicted else self._order[0]
            is_needed = not self.resident[key] and key not in self
            if is_needed and len(self._needed) + coming >= self.most:
                return None
            if self._evicted:
                del self._evicted[key]
            else:
                self._order.popleft()
            if is_needed:
                return key
        return None

    def _records(self, key: ExpertKey) -> OrderedDict[ExpertKey, HostRecord]:
        return self._spares if self.resident[key] else self._needed
