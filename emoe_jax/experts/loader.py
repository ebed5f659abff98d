"""The loader moves experts into the slab: a worker thread stages them, and the owner of the step commits them."""

import contextlib
import dataclasses
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import Array, Bool, Float

from emoe_jax.errors import CapacityError
from emoe_jax.experts.link import ModelledLink
from emoe_jax.experts.slab import ExpertSlab
from emoe_jax.experts.store import ExpertStore, HostRecord
from emoe_jax.experts.table import EMPTY, SlotTable
from emoe_jax.experts.tickets import LoadState, LoadTicket, TicketQueue
from emoe_jax.experts.writes import Writes

_WINDOW_BYTES = 64 << 20


def _default_window(record_bytes: int) -> int:
    return min(max(_WINDOW_BYTES // record_bytes, 4), 32)


def staging_bytes(record_bytes: int) -> int:
    """The most that experts on their way to the slab take on the device, `load_now` running."""
    return 2 * _default_window(record_bytes) * record_bytes


@dataclasses.dataclass(frozen=True)
class LoaderStats:
    """Totals since the loader was made. `busy_seconds`: time with at least one thread staging. `wait_seconds`: time in
    `load_now`, of which `waited_loads` are the experts.
    """

    loads: int = 0
    loaded_bytes: int = 0
    staged_bytes: int = 0
    busy_seconds: float = 0.0
    commit_seconds: float = 0.0
    retries: int = 0
    failures: int = 0
    cancelled: int = 0
    wasted: int = 0
    waited_loads: int = 0
    wait_seconds: float = 0.0

    @property
    def bandwidth(self) -> float | None:
        """Measured bytes/s from the store to the device while staging; None before the first load."""
        return self.staged_bytes / self.busy_seconds if self.busy_seconds else None


class ExpertLoader:
    """`request` -> a worker thread stages -> `commit` between steps; `load_now` where a step waits.

    `commit`, `load_now` and `fill` change the slab and its table and belong to the owner of the step alone; the other
    methods may be called from any thread. A failing read is tried `retries` more times, `backoff` seconds later and
    twice that each further time, and never ends the worker. `bandwidth` (bytes/s) says how often background loads may
    start, and a modelled `link` how long any load takes. At most `window` experts (by default as many as 64 MiB
    hold, 4 to 32) are held between store and slab, and as many again while `load_now` runs.

    No mark protects a slot that the running step may read. Three facts do:
    - One thread dispatches steps and changes slots, so nothing changes while the arguments of a step are collected.
    - A step gets copies of the slot table (`SlotTable.device_table`, a wave's slots) that no later change reaches.
    - A commit donates the arrays that the step reads. The device therefore runs the commit after the step, and a step
      that was dispatched before the commit reads the weights from before it.
    `load_now` also never evicts an expert that it was asked for.
    """

    def __init__(
        self,
        store: ExpertStore,
        slab: ExpertSlab,
        table: SlotTable,
        *,
        bandwidth: float | None = None,
        link: ModelledLink | None = None,
        window: int | None = None,
        retries: int = 2,
        backoff: float = 0.05,
    ):
        self._store = store
        self._slab = slab
        self._table = table
        nbytes = store.layout.nbytes
        self._window = window or _default_window(nbytes)
        self._retries = retries
        self._backoff = backoff
        self._link = link
        self._queue = TicketQueue(nbytes, self._window, bandwidth)
        self._lock = threading.Lock()  # guards the three fields below
        self._totals: Counter[str] = Counter()  # fields of LoaderStats
        self._lost: dict[int, list[int]] = {}  # layer -> experts that a failed commit cost
        self._staging = 0
        self._busy_since = 0.0
        self._worker = threading.Thread(target=self._work, name="expert-loader", daemon=True)
        self._worker.start()

    @property
    def wait_seconds(self) -> float:
        """As in `stats`."""
        return self._totals["wait_seconds"]

    @property
    def stats(self) -> LoaderStats:
        """A copy of the totals since the loader was made. Any thread may ask."""
        with self._lock:
            return LoaderStats(**self._totals)

    def request(self, layer: int, expert: int, priority: float = 0.0, *, evict: int | None = None) -> LoadTicket:
        """Ask for an expert, in place of resident expert `evict` or in an empty slot. Higher priorities come first.

        A second request for the same expert returns the first one's ticket, with the higher of the priorities.
        """
        self._check_expert(layer, expert)
        if evict is not None:
            self._check_expert(layer, evict)
        if evict == expert:
            raise ValueError(f"expert {expert} of layer {layer} cannot replace itself")
        return self._queue.request(layer, expert, priority, evict)

    def cancel(self, ticket: LoadTicket) -> bool:
        """Give up a request. False when it is over already, or `load_now` is waiting for it."""
        cancelled = self._queue.cancel(ticket)
        self._count(cancelled=int(cancelled))
        return cancelled

    def in_flight(self) -> Bool[np.ndarray, "M E"]:
        """Experts on their way in, and those they are to replace: not to be asked for again."""
        return self._queue.in_flight(self._table.num_layers, self._table.num_experts)

    def wait_idle(self, timeout: float | None = None) -> bool:
        """Wait until nothing more can be staged before the next `commit`; False when `timeout` seconds ran out."""
        return self._queue.wait_idle(timeout)

    def on_settled(self, call: Callable[[], None]) -> None:
        """Have the worker call `call` when something is staged and nothing more can be before a `commit`.
        It must be quick and must not call back.
        """
        self._queue.on_settled = call

    @property
    def has_ready(self) -> bool:
        """Whether a `commit` would find anything staged."""
        return self._queue.has_ready

    def commit(self) -> list[LoadTicket]:
        """Bring all staged experts into slab and table, by priority; never waits. The committed tickets.

        A ticket whose expert arrived by other means, or whose place is gone, ends as `STALE`.

        Raises what went wrong on the device. Every ticket taken is over then. Slots whose weights were not written are
        empty, a layer whose arrays are gone has new ones, and `restore` loads what was there.
        """
        began = time.perf_counter()
        taken = self._queue.take_ready()
        with self._writes(taken) as writes:
            for ticket in taken:
                slot = self._slot_for(ticket)
                if slot is None:
                    self._queue.finish(ticket, LoadState.STALE)
                    self._count(wasted=1)
                else:
                    writes.add(ticket, slot)
        self._count(commit_seconds=time.perf_counter() - began)
        return writes.tickets

    def load_now(self, layer: int, experts: Iterable[int], evictable: Iterable[int] = ()) -> int:
        """Make `experts` of a layer resident before returning; how many had to be loaded.

        They go to empty slots, then to those of `evictable` experts in the order given; wanted ones are passed over.
        Raises `CapacityError` (nothing loaded) when that is not enough, and what the store raised when a
        read keeps failing (experts that came before it are resident, the table is right).
        """
        wanted = sorted(set(map(int, experts)))
        for expert in wanted:
            self._check_expert(layer, expert)
        missing = [expert for expert in wanted if not self._table.is_resident(layer, expert)]
        if not missing:
            return 0
        slots = self._table.empty_slots(layer)
        for expert in dict.fromkeys(evictable):
            if expert not in wanted and self._table.is_resident(layer, expert):
                slots.append(self._table.slot(layer, expert))
        if len(slots) < len(missing):
            raise CapacityError(
                f"layer {layer} must load {len(missing)} experts, but only {len(slots)} of its "
                f"{self._table.capacities[layer]} slots are empty or may be replaced"
            )
        began = time.perf_counter()
        try:
            self._load([(layer, expert, slot) for expert, slot in zip(missing, slots, strict=False)])
        finally:
            self._count(wait_seconds=time.perf_counter() - began, waited_loads=len(missing))
        return len(missing)

    def fill(self, experts: Sequence[Iterable[int]], on_progress: Callable[[int, int], None] | None = None) -> None:
        """Load experts of every layer into empty slots, in the order of the files. For the start of an engine.

        `on_progress(done, total)` is called after every commit. Raises like `load_now`.
        """
        wanted = []
        for layer, chosen in enumerate(experts):
            missing = [e for e in sorted(set(map(int, chosen))) if not self._table.is_resident(layer, e)]
            empty = self._table.empty_slots(layer)
            if len(missing) > len(empty):
                raise CapacityError(f"layer {layer} has {len(empty)} empty slots for {len(missing)} experts")
            wanted += [(layer, expert, slot) for expert, slot in zip(missing, empty, strict=False)]
        self._load(wanted, on_progress)

    @property
    def must_restore(self) -> bool:
        """Whether a layer lost experts to a commit that failed."""
        return bool(self._lost)

    def restore(self) -> None:
        """Load experts that failed commits have cost once more. For the owner of the step, before the next one.

        Raises like `load_now`; what has not been loaded then is tried again with the next call.
        """
        for layer, experts in list(self._lost.items()):
            missing = [expert for expert in experts if not self._table.is_resident(layer, expert)]
            self.load_now(layer, missing[: len(self._table.empty_slots(layer))])
            del self._lost[layer]

    def mend(self) -> None:
        """After a step has failed: find layers whose arrays are gone, as `commit` does where it fails itself."""
        for layer in range(self._table.num_layers):
            self._rebuild_if_lost(layer)

    def close(self) -> None:
        """Cancel what is under way and join the worker."""
        self._queue.close()
        self._worker.join()

    def __enter__(self) -> "ExpertLoader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _load(
        self, wanted: Sequence[tuple[int, int, int]], on_progress: Callable[[int, int], None] | None = None
    ) -> None:
        """Bring `(layer, expert, slot)`s in. This thread stages too; one commit runs while the next is being staged."""
        waiting: dict[LoadTicket, int] = {}
        try:
            self._load_through(wanted, waiting, on_progress)
        finally:
            self._queue.give_up(waiting)  # none, unless something failed: no thread would take them any more

    def _load_through(
        self,
        wanted: Sequence[tuple[int, int, int]],
        waiting: dict[LoadTicket, int],
        on_progress: Callable[[int, int], None] | None,
    ) -> None:
        """`_load`, with the tickets that it has not taken care of in `waiting`."""
        remaining = iter(wanted)
        running: set[int] = set()  # layers whose commit may still run
        ahead = max(1, self._window // 2)  # as many again are being copied by the commit that runs
        done = 0
        error: Exception | None = None
        while True:
            while error is None and len(waiting) < ahead and (item := next(remaining, None)) is not None:
                layer, expert, slot = item
                # This thread takes the first one, and those that need no reading, before the worker could wake up.
                wake = bool(waiting) and not self._store.is_in_host_memory(layer, expert)
                waiting[self._queue.request(layer, expert, np.inf, urgent=True, wake=wake)] = slot
            if not waiting:
                break
            while (ticket := self._queue.next_urgent()) is not None:
                self._stage(ticket)
            over = self._queue.wait_any(waiting)
            began = time.perf_counter()
            for layer in running:  # bounds the records that unfinished copies keep in host memory
                self._slab.block_until_ready(layer)
            staged = [ticket for ticket in over if ticket.state is LoadState.COMMITTING]
            with self._writes(staged) as writes:
                for ticket in staged:
                    writes.add(ticket, waiting[ticket])
            running = {ticket.layer for ticket in staged}
            self._count(commit_seconds=time.perf_counter() - began)
            for ticket in over:
                del waiting[ticket]
                if ticket not in staged:
                    error = error or ticket.error or RuntimeError("the expert loader was closed while loading")
            done += len(staged)
            if on_progress is not None and staged:
                on_progress(done, len(wanted))
        if error is not None:
            raise error

    def _slot_for(self, ticket: LoadTicket) -> int | None:
        """Where a staged expert goes now, or None when there is no place or no need for it."""
        if self._table.is_resident(ticket.layer, ticket.expert):
            return None
        if ticket.evict is not None and self._table.is_resident(ticket.layer, ticket.evict):
            return self._table.slot(ticket.layer, ticket.evict)
        return next(iter(self._table.empty_slots(ticket.layer)), None)

    @contextlib.contextmanager
    def _writes(self, taken: Sequence[LoadTicket]) -> Iterator[Writes]:
        """Collect the writes of one commit: at the end they are in slab and table. If anything failed, those that are
        not are given up, and so are all tickets that were `taken` for it.
        """
        writes = Writes(self._table)
        try:
            yield writes
            writes.flush(self._slab)
        except BaseException as error:
            for layer, evicted in writes.abandon().items():
                self._lost.setdefault(layer, []).extend(evicted)
                self._rebuild_if_lost(layer)
            cause = error if isinstance(error, Exception) else None
            for ticket in taken:
                if ticket.state is not LoadState.COMMITTING:
                    continue
                resident = ticket in writes.tickets and self._table.is_resident(ticket.layer, ticket.expert)
                self._queue.finish(ticket, LoadState.COMMITTED if resident else LoadState.FAILED, cause)
                self._count(loads=resident, failures=not resident)
            raise
        for ticket in writes.tickets:
            self._queue.finish(ticket, LoadState.COMMITTED)
        self._count(loads=len(writes.tickets), loaded_bytes=len(writes.tickets) * self._store.layout.nbytes)

    def _rebuild_if_lost(self, layer: int) -> None:
        """Give a layer new arrays if it has none, without experts. Those it had are noted for `restore`."""
        if not self._slab.is_lost(layer):
            return
        experts = self._table.expert_of_slot(layer)
        self._lost.setdefault(layer, []).extend(int(expert) for expert in experts[experts != EMPTY])
        for slot in range(self._table.capacities[layer]):
            self._table.release(layer, slot)
        self._slab.rebuild(layer)

    def _work(self) -> None:
        while (ticket := self._queue.next()) is not None:
            self._stage(ticket)

    def _stage(self, ticket: LoadTicket) -> None:
        """Read an expert and bring it to the device; whatever goes wrong ends in the ticket."""
        try:
            with self._busy():
                staged = self._transfer(ticket, self._store.read(ticket.layer, ticket.expert))
        except Exception as error:
            again = ticket.attempts <= self._retries
            self._count(retries=int(again), failures=int(not again))
            self._queue.set_failed(ticket, error, self._backoff * 2 ** (ticket.attempts - 1) if again else None)
        else:
            kept = self._queue.set_ready(ticket, staged)
            self._count(staged_bytes=self._store.layout.nbytes, wasted=int(not kept))

    def _transfer(self, ticket: LoadTicket, record: HostRecord) -> Float[Array, " P"]:
        """Bring a record to the device, over the modelled link where there is one."""
        if self._link is None:
            return self._slab.stage(record).block_until_ready()
        with self._link.transfer(self._store.layout.nbytes, lambda: ticket.urgent):
            return self._slab.stage(record).block_until_ready()

    @contextlib.contextmanager
    def _busy(self) -> Iterator[None]:
        with self._lock:
            if not self._staging:
                self._busy_since = time.perf_counter()
            self._staging += 1
        try:
            yield
        finally:
            with self._lock:
                self._staging -= 1
                if not self._staging:
                    self._totals.update({"busy_seconds": time.perf_counter() - self._busy_since})

    def _count(self, **increments: float) -> None:
        with self._lock:
            self._totals.update(increments)

    def _check_expert(self, layer: int, expert: int) -> None:
        if not (0 <= layer < self._table.num_layers and 0 <= expert < self._table.num_experts):
            raise IndexError(
                f"no expert {expert} in layer {layer}: the model has {self._table.num_layers} MoE layers "
                f"of {self._table.num_experts} experts"
            )
