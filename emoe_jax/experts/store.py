"""The read-only home of every expert off the device: checkpoint files, and host memory in front of them."""

import dataclasses
import threading
import time
from collections import Counter, OrderedDict
from typing import Protocol, runtime_checkable

import jax
import numpy as np

from emoe_jax.errors import ConfigError
from emoe_jax.experts.weights import ExpertLayout

# A flat record of `layout.size` numbers, in numpy memory or in pinned host memory. Never written again once published.
HostRecord = np.ndarray | jax.Array

_ALIGNMENT = 64


@runtime_checkable
class ExpertReader(Protocol):
    """The source that the store reads from, such as a `Checkpoint`. `layer` counts MoE layers only."""

    def read_expert(self, layer: int, expert: int, record: np.ndarray, layout: ExpertLayout, /) -> None:
        """Fill `record` (`[layout.size]`, slab dtype). May be called from several threads at once; may raise."""
        ...


@dataclasses.dataclass(frozen=True)
class StoreStats:
    """Totals since the store was made. `seconds` is time inside the reader, summed over threads; `unpinned`
    counts records for which there was no page-locked memory."""

    hits: int = 0
    reads: int = 0
    failed_reads: int = 0
    read_bytes: int = 0
    seconds: float = 0.0
    evictions: int = 0
    unpinned: int = 0
    host_bytes: int = 0


def aligned_record(layout: ExpertLayout) -> np.ndarray:
    """Uninitialised memory for one record, aligned so that `device_put` on CPU aliases it instead of copying."""
    raw = np.empty(layout.nbytes + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + layout.nbytes].view(layout.dtype)


class ExpertStore:
    """`read(layer, expert)` through a least-recently-used host tier of at most `host_budget_bytes`.

    Thread-safe. Threads that ask for the same expert at once share one read. Records are handed out without a copy, so
    the host tier may let go of a record that a caller still holds; its memory is freed when the last holder drops it.

    `memory_kind="pinned_host"` keeps the tier in page-locked memory, one array per expert, from where an accelerator
    fetches at link speed (`sharding` names it; the default device otherwise). `None` keeps numpy memory, which a CPU
    device can use in place.
    """

    def __init__(
        self,
        reader: ExpertReader,
        layout: ExpertLayout,
        num_layers: int,
        num_experts: int,
        host_budget_bytes: int = 0,
        *,
        memory_kind: str | None = None,
        sharding: jax.sharding.SingleDeviceSharding | None = None,
    ):
        if host_budget_bytes < 0:
            raise ConfigError(f"host memory budget of {host_budget_bytes} bytes is negative")
        self.layout = layout
        self.num_layers = num_layers
        self.num_experts = num_experts
        self._reader = reader
        self._host_records = host_budget_bytes // layout.nbytes
        self._pinned = None
        if memory_kind is not None:
            sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
            self._pinned = sharding.with_memory_kind(memory_kind)
        self._lock = threading.Lock()
        self._tier: OrderedDict[tuple[int, int], HostRecord] = OrderedDict()
        self._reading: dict[tuple[int, int], _Read] = {}
        self._totals: Counter[str] = Counter()  # fields of StoreStats

    def read(self, layer: int, expert: int) -> HostRecord:
        """The record of one expert, `[layout.size]`, read-only. Raises whatever the reader raises."""
        if not (0 <= layer < self.num_layers and 0 <= expert < self.num_experts):
            raise IndexError(
                f"no expert {expert} in layer {layer}: {self.num_layers} x {self.num_experts} in the store"
            )
        key = (layer, expert)
        with self._lock:
            record = self._tier.get(key)
            if record is not None:
                self._tier.move_to_end(key)
                self._count(hits=1)
                return record
            read = self._reading.get(key)
            leads = read is None
            if read is None:
                read = self._reading[key] = _Read()
        if not leads:
            return read.wait()
        try:
            read.record = self._read_files(layer, expert)
            return read.record
        except BaseException as error:
            read.error = error
            raise
        finally:
            with self._lock:
                del self._reading[key]
                if read.record is not None:
                    self._keep(key, read.record)
            read.done.set()

    def is_in_host_memory(self, layer: int, expert: int) -> bool:
        """Whether a `read` now would be a hit. Does not count as a use of the record."""
        with self._lock:
            return (layer, expert) in self._tier

    @property
    def stats(self) -> StoreStats:
        """A consistent copy of the totals, and the bytes that the host tier holds now."""
        with self._lock:
            return StoreStats(**self._totals, host_bytes=len(self._tier) * self.layout.nbytes)

    def _read_files(self, layer: int, expert: int) -> HostRecord:
        record = aligned_record(self.layout)
        began = time.perf_counter()
        try:
            self._reader.read_expert(layer, expert, record, self.layout)
        except BaseException:
            with self._lock:
                self._count(failed_reads=1, seconds=time.perf_counter() - began)
            raise
        with self._lock:
            self._count(reads=1, read_bytes=self.layout.nbytes, seconds=time.perf_counter() - began)
        record.flags.writeable = False  # device arrays may alias it: a later write would change the slab's source
        if self._pinned is None or not self._host_records:
            return record
        try:
            return jax.block_until_ready(jax.device_put(record, self._pinned))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            with self._lock:  # no more page-locked memory: the tier stays as large as it is
                self._host_records = len(self._tier)
                self._count(unpinned=1)
            return record

    def _keep(self, key: tuple[int, int], record: HostRecord) -> None:
        if not self._host_records:
            return
        self._tier[key] = record
        while len(self._tier) > self._host_records:
            self._tier.popitem(last=False)
            self._count(evictions=1)

    def _count(self, **increments: float) -> None:
        self._totals.update(increments)


class _Read:
    """One read in progress, and where the threads that want the same expert wait for it."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.record: HostRecord | None = None
        self.error: BaseException | None = None

    def wait(self) -> HostRecord:
        self.done.wait()
        if self.error is not None:
            raise self.error
        assert self.record is not None
        return self.record
