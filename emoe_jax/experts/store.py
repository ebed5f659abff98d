"""The read-only home of every expert off the device: checkpoint files, and host memory in front of them."""

import contextlib
import dataclasses
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Bool

from emoe_jax.errors import ConfigError
from emoe_jax.experts.filler import TierFiller
from emoe_jax.experts.host_tier import ExpertKey, HostTier
from emoe_jax.experts.pieces import PIECE_BYTES, HostRecord, Rounds
from emoe_jax.experts.record_format import RecordFormat

_ALIGNMENT = 64
_FILLERS = 2  # threads: one reads while the other pins
_CPU_SHARE = 0.5  # of the time of a thread that fills the tier beside steps on the same cores


@runtime_checkable
class ExpertReader(Protocol):
    """The source that the store reads from, such as a `Checkpoint`. `layer` counts MoE layers only."""

    def read_expert(self, layer: int, expert: int, record: np.ndarray, record_format: RecordFormat, /) -> None:
        """Fill `record` (`[record_format.size]`, slab dtype). May be called from several threads at once; may raise."""
        ...


@dataclasses.dataclass(frozen=True)
class StoreStats:
    """Totals since the store was made. `hits` are reads from host memory, `reads` those from files, of which `fills`
    were in the background. `seconds` is time inside the reader, summed over threads; `unpinned` counts records for
    which there was no page-locked memory."""

    hits: int = 0
    reads: int = 0
    fills: int = 0
    failed_reads: int = 0
    read_bytes: int = 0
    seconds: float = 0.0
    evictions: int = 0
    unpinned: int = 0
    host_bytes: int = 0


def aligned_record(record_format: RecordFormat) -> np.ndarray:
    """Uninitialised memory for one record, aligned so that `device_put` on CPU aliases it instead of copying."""
    raw = np.empty(record_format.nbytes + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + record_format.nbytes].view(record_format.dtype)


class ExpertStore:
    """`read(layer, expert)` through a host tier of at most `host_budget_bytes`, which `start_filling` fills.

    Thread-safe. Threads that ask for the same expert at once share one read. Records are handed out without a copy, so
    the host tier may let go of a record that a caller still holds; its memory is freed when the last holder drops it.

    `memory_kind="pinned_host"` keeps the tier in page-locked memory, one array per expert, from where an accelerator
    fetches at link speed (`sharding` names it; the default device otherwise). `None` keeps numpy memory. Where
    `sharding` is a CPU's, the tier has it as arrays of that device, so that staging an expert takes no call.
    """

    def __init__(
        self,
        reader: ExpertReader,
        record_format: RecordFormat,
        num_layers: int,
        num_experts: int,
        host_budget_bytes: int = 0,
        *,
        memory_kind: str | None = None,
        sharding: jax.sharding.SingleDeviceSharding | None = None,
        piece_bytes: int = PIECE_BYTES,
    ):
        if host_budget_bytes < 0:
            raise ConfigError(f"host memory budget of {host_budget_bytes} bytes is negative")
        self.record_format = record_format
        self.num_layers = num_layers
        self.num_experts = num_experts
        self._reader = reader
        self._rounds = Rounds(record_format, piece_bytes)
        self._tier = HostTier(host_budget_bytes // record_format.nbytes, num_layers, num_experts)
        self._pins = memory_kind is not None
        self._kept_in: jax.sharding.SingleDeviceSharding | None = None
        """Of the tier's arrays; None where its records are numpy's."""
        if memory_kind is not None:
            sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
            self._kept_in = sharding.with_memory_kind(memory_kind)
        elif sharding is not None and not self._rounds.pieces:
            (device,) = sharding.device_set
            self._kept_in = sharding if device.platform == "cpu" else None
        self._lock = threading.Lock()
        self._wanted = threading.Condition(self._lock)  # the fillers wait here for something to do
        self._filler: TierFiller | None = None
        self._closed = False
        self._keeps_loads = True
        self._reading: dict[ExpertKey, _Read] = {}
        self._filling: set[ExpertKey] = set()
        self._loads = 0  # reads under way for which no filler asked
        self._totals: Counter[str] = Counter()  # fields of StoreStats

    def read(self, layer: int, expert: int) -> HostRecord:
        """The record of one expert, `[record_format.size]`, read-only. Raises whatever the reader raises."""
        with self._lock:
            self._loads += 1
        try:
            return self._read(layer, expert)
        finally:
            with self._lock:
                self._loads -= 1
                self._wanted.notify()

    @contextlib.contextmanager
    def keeping_nothing(self) -> Iterator[None]:
        """What loads read within the block does not stay in host memory."""
        self._keeps_loads = False
        try:
            yield
        finally:
            self._keeps_loads = True

    def start_filling(self, order: Iterable[ExpertKey]) -> None:
        """Have experts that are not on the device read into the host tier in the background, in this order.

        From now on, so is each that leaves the device and is not there. Without a tier this does nothing.
        """
        if not self._tier.most:
            return
        with self._lock:
            self._tier.fill(order)
            self._wanted.notify_all()
        if self._filler is None:
            self._filler = TierFiller(self, *((_FILLERS, 1.0) if self._pins else (1, _CPU_SHARE)))

    def use_residents(self, resident: Bool[np.ndarray, "M E"]) -> None:
        """These experts are on the device, and others are not: their records stay in host memory longest.

        The array must not change any more.
        """
        if self._tier.most:
            with self._lock:
                self._tier.use_residents(resident)
                self._wanted.notify()

    def next_fill(self) -> ExpertKey | None:
        """Wait for a record that should be read in the background; None once the store is closed. For fillers.

        While a load reads, nothing is to be filled: it would share the disk.
        """
        with self._lock:
            while not self._closed:
                key = None if self._loads else self._tier.next_wanted(len(self._filling))
                if key is not None:
                    self._filling.add(key)
                    return key
                self._wanted.wait()
            return None

    def fill_one(self, layer: int, expert: int) -> None:
        """Read a record and keep it. For fillers. Raises whatever the reader raises."""
        try:
            self._read(layer, expert, is_fill=True)
        finally:
            with self._lock:
                self._filling.discard((layer, expert))
                self._wanted.notify()  # where it was not kept, there is room for another

    def close(self) -> None:
        """Stop filling. Reading goes on."""
        with self._lock:
            self._closed = True
            self._wanted.notify_all()
        if self._filler is not None:
            self._filler.join()

    def _read(self, layer: int, expert: int, is_fill: bool = False) -> HostRecord:
        if not (0 <= layer < self.num_layers and 0 <= expert < self.num_experts):
            raise IndexError(
                f"no expert {expert} in layer {layer}: {self.num_layers} x {self.num_experts} in the store"
            )
        key = (layer, expert)
        with self._lock:
            record = self._tier.get(key)
            if record is not None:
                self._count(hits=int(not is_fill))
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
                    self._count(fills=int(is_fill))
                    if self._tier.most and (self._keeps_loads or is_fill):
                        self._count(evictions=self._tier.keep(key, read.record))
            read.done.set()

    def at_hand(self, layer: int, expert: int) -> HostRecord | None:
        """What `read` would return without reading. None, and nothing counts, where that is nothing."""
        with self._lock:
            record = self._tier.get((layer, expert))
            self._count(hits=int(record is not None))
            return record

    def is_in_host_memory(self, layer: int, expert: int) -> bool:
        """Whether a `read` now would be a hit. Does not count as a use of the record."""
        with self._lock:
            return (layer, expert) in self._tier

    @property
    def stats(self) -> StoreStats:
        """A consistent copy of the totals, and the bytes that the host tier holds now."""
        with self._lock:
            return StoreStats(**self._totals, host_bytes=len(self._tier) * self.record_format.nbytes)

    def _read_files(self, layer: int, expert: int) -> HostRecord:
        record = aligned_record(self.record_format)
        began = time.perf_counter()
        try:
            self._reader.read_expert(layer, expert, record, self.record_format)
        except BaseException:
            with self._lock:
                self._count(failed_reads=1, seconds=time.perf_counter() - began)
            raise
        with self._lock:
            self._count(reads=1, read_bytes=self.record_format.nbytes, seconds=time.perf_counter() - began)
        record.flags.writeable = False  # device arrays may alias it: a later write would change the slab's source
        if self._kept_in is None or not self._tier.most:
            return record
        try:
            parts = tuple(jax.device_put(part, self._kept_in) for part in self._rounds.cut(record))
            return jax.block_until_ready(parts if self._rounds.pieces else parts[0])
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            with self._lock:  # no more page-locked memory: the tier stays as large as it is
                self._tier.most = len(self._tier)
                self._count(unpinned=1)
            return record

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
