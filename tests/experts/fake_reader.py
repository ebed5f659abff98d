"""A reader with numbers of its own for every expert, that can be made to fail, to wait, or to count."""

import threading
from collections import Counter

import numpy as np

from emoe_jax.experts.record_format import RecordFormat

# Small, and not a multiple of 64 bytes, so that nothing depends on lucky alignment.
RECORD_FORMAT = RecordFormat.plain((6, 3), (3, 3), np.dtype(np.float32))


def expected(layer: int, expert: int, record_format: RecordFormat = RECORD_FORMAT) -> np.ndarray:
    """The record of an expert: no two experts share a number."""
    return ((layer * 100 + expert + 1) * 1000 + np.arange(record_format.size) % 1000).astype(record_format.dtype)


class FakeReader:
    """Reads succeed at once unless told otherwise. `gate` cleared makes them wait."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.failures: Counter[tuple[int, int]] = Counter()
        self.reads: list[tuple[int, int]] = []
        self._lock = threading.Lock()

    def fail(self, layer: int, expert: int, times: int) -> None:
        with self._lock:
            self.failures[layer, expert] = times

    def read_expert(self, layer: int, expert: int, record: np.ndarray, record_format: RecordFormat) -> None:
        with self._lock:
            self.reads.append((layer, expert))
            fails = self.failures[layer, expert] > 0
            self.failures[layer, expert] -= fails
        assert self.gate.wait(30), "a test left the gate closed"
        record[: record.size // 2] = -1  # half-written first: must never be seen
        if fails:
            raise OSError(f"cannot read expert {expert} of layer {layer}")
        record[:] = expected(layer, expert, record_format)
