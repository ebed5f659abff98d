"""The loader moves experts into the slab: a worker thread stages them, and the owner of the step commits them."""

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import numpy as np
from jaxtyping import Array, Bool, Num

from emoe_jax.errors import CapacityError
from emoe_jax.experts.half_written import HalfWritten
from emoe_jax.experts.link import ModelledLink
from emoe_jax.experts.loader_stats import BusyTime, LoaderStats
from emoe_jax.experts.pieces import HostRecord, default_window, staged_ahead
from emoe_jax.experts.places import Place, places_for
from emoe_jax.experts.slab import ExpertSlab
from emoe_jax.experts.store import ExpertStore
from emoe_jax.experts.table import EMPTY, SlotTable
from emoe_jax.experts.tickets import LoadState, LoadTicket, TicketQueue
from emoe_jax.experts.writes import Writes


class ExpertLoader:
    """`request` -> a worker thread stages -> `commit` between steps; `load_now` where a step waits.

    `commit`, `load_now` and `fill` change the slab and its table and belong to the owner of the step alone; the other
    methods may be called from any thread. A failing read is tried `retries` more times, `backoff` seconds later and
    twice that each further time, and never ends a worker. `bandwidth` (bytes/s) says how often background loads may
    start, and a modelled `link` how long any load takes. With two `workers`, one reads while the other copies. At most
    `window` experts (by default as many as 64 MiB hold, 4 to 32) are held between store and slab, and as many again
    while `load_now` runs.

    Large records come in rounds of a few pieces (`slab.rounds`), and `window` counts rounds. With the first round the
    expert that makes room leaves the table, with the last one the new expert enters it: no step reads a slot that is
    written in part.

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
        workers: int = 1,
    ):
        self._store = store
        self._slab = slab
        self._table = table
        nbytes = store.record_format.nbytes
        self._window = window or default_window(nbytes)
        self._retries = retries
        self._backoff = backoff
        self._link = link
        self._queue = TicketQueue(nbytes, self._window, bandwidth, len(slab.rounds))
        self._half_written = HalfWritten(table, self._queue, lambda layer, expert: self._lose(layer, [expert]))
        self._lock = threading.Lock()  # guards the two fields below
        self._totals: Counter[str] = Counter()  # fields of LoaderStats
        self._lost: dict[int, list[int]] = {}  # layer -> experts that a failed commit cost
        self._busy = BusyTime()
        self._workers = [threading.Thread(target=self._work, name="expert-loader", daemon=True) for _ in range(workers)]
        for worker in self._workers:
            worker.start()

    @property
    def wait_seconds(self) -> float:
        """As in `stats`."""
        return self._totals["wait_seconds"]

    @property
    def stats(self) -> LoaderStats:
        """A copy of the totals since the loader was made. Any thread may ask."""
        with self._lock:
            return LoaderStats(**self._totals, busy_seconds=self._busy.seconds)

    def request(self, layer: int, expert: int, priority: float = 0.0, *, evict: int | None = None) -> LoadTicket:
        """Ask for an expert, in place of resident expert `evict` or in an empty slot. Higher priorities come first.

        A second request for the same expert returns the first one's ticket, with the higher of the priorities.
        """
        self._table.check_expert(layer, expert)
        if evict is not None:
            self._table.check_expert(layer, evict)
        if evict == expert:
            raise ValueError(f"expert {expert} of layer {layer} cannot replace itself")
        return self._queue.request(layer, expert, priority, evict)

    def cancel(self, ticket: LoadTicket) -> bool:
        """Give up a request. False when it is over already, written in part, or `load_now` is waiting for it."""
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
        """Whether a `commit` would find anything to do."""
        return self._queue.has_ready or self._half_written.has_over

    def commit(self) -> list[LoadTicket]:
        """Bring all that is staged into slab and table, by priority; never waits. The tickets whose experts are there.

        A ticket whose expert arrived by other means, or whose place is gone, ends as `STALE`.

        Raises what went wrong on the device. Every ticket taken is over then. Slots whose weights were not written are
        empty, a layer whose arrays are gone has new ones, and `restore` loads what was there.
        """
        began = time.perf_counter()
        self._half_written.sweep()
        taken = self._queue.take_ready()
        try:
            with self._writes(taken) as writes:
                for ticket in taken:
                    slot = self._slot_for(ticket)
                    if slot is None:
                        self._queue.finish(ticket, LoadState.STALE)
                        self._count(wasted=1)
                    else:
                        writes.add(ticket, slot)
        finally:
            self._store.use_residents(self._table.resident_mask)
        self._count(commit_seconds=time.perf_counter() - began)
        return writes.tickets

    def load_now(self, layer: int, experts: Iterable[int], evictable: Iterable[int] = ()) -> int:
        """`load_layers` for one layer."""
        return self.load_layers([(layer, experts, evictable)])

    def load_layers(self, wanted: Iterable[tuple[int, Iterable[int], Iterable[int]]]) -> int:
        """Make `(layer, experts, evictable)` resident before returning; how many had to be loaded.

        Experts go to empty slots, then to those of `evictable` experts in the order given; wanted ones are passed over.
        Raises `CapacityError` (nothing loaded) when that is not enough, and what the store raised when a
        read keeps failing (experts that came before it are resident, the table is right).
        """
        places = [place for each in wanted for place in places_for(*each, self._table, self._half_written)]
        if not places:
            return 0
        began = time.perf_counter()
        try:
            self._load(places)
        finally:
            self._count(wait_seconds=time.perf_counter() - began, waited_loads=len(places))
        return len(places)

    def fill(self, experts: Sequence[Iterable[int]], on_progress: Callable[[int, int], None] | None = None) -> None:
        """Load experts of every layer into empty slots, in the order of the files. For the start of an engine.

        Host memory is left to those that are not resident.

        `on_progress(done, total)` is called after every commit. Raises like `load_now`.
        """
        wanted = []
        for layer, chosen in enumerate(experts):
            missing = [e for e in sorted(set(map(int, chosen))) if not self._table.is_resident(layer, e)]
            empty = self._table.empty_slots(layer)
            if len(missing) > len(empty):
                raise CapacityError(f"layer {layer} has {len(empty)} empty slots for {len(missing)} experts")
            wanted += [(layer, expert, slot) for expert, slot in zip(missing, empty, strict=False)]
        with self._store.keeping_nothing():
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
            missing = [expert for expert in dict.fromkeys(experts) if not self._table.is_resident(layer, expert)]
            self.load_now(layer, missing[: len(self._table.empty_slots(layer))])
            del self._lost[layer]

    def mend(self) -> None:
        """After a step has failed: find layers whose arrays are gone, as `commit` does where it fails itself."""
        for layer in range(self._table.num_layers):
            self._rebuild_if_lost(layer)

    def drop_half_written(self, layer: int) -> None:
        """Before a layer gets other slots: give up experts that are written in part. For the owner of the step."""
        self._half_written.drop(layer)

    def close(self) -> None:
        """Cancel what is under way and join the workers."""
        self._queue.close()
        for worker in self._workers:
            worker.join()

    def __enter__(self) -> "ExpertLoader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _load(self, wanted: Sequence[Place], on_progress: Callable[[int, int], None] | None = None) -> None:
        """Bring `(layer, expert, slot)`s in. This thread stages too; one commit runs while the next is being staged."""
        waiting: dict[LoadTicket, int] = {}
        try:
            if on_progress is None:
                wanted = self._load_at_hand(wanted)
            self._load_through(wanted, waiting, on_progress)
        finally:
            self._queue.give_up(waiting)  # none, unless something failed: no thread would take them any more
            self._half_written.sweep()
            self._store.use_residents(self._table.resident_mask)

    def _load_at_hand(self, wanted: Sequence[Place]) -> list[Place]:
        """Bring in what host memory has and one round moves. Returns the others, which need the queue.

        For a small expert the queue takes longer than the copy: its tickets, locks and wake-ups.
        """
        if self._link is not None or self._slab.rounds.pieces:
            return list(wanted)
        at_hand: list[tuple[LoadTicket, int]] = []
        records: list[np.ndarray | jax.Array] = []
        others = []
        for layer, expert, slot in wanted:
            record = None if self._queue.has(layer, expert) else self._store.at_hand(layer, expert)
            if record is None:
                others.append((layer, expert, slot))
            else:
                assert not isinstance(record, tuple)  # only records in pieces are
                records.append(record)
                at_hand.append((LoadTicket(layer, expert, np.inf, None), slot))
        together = staged_ahead(self._window)
        for first in range(0, len(at_hand), together):
            for ticket, _ in at_hand[max(0, first - together) : first]:  # bounds what the device has of records
                self._slab.block_until_ready(ticket.layer)
            with self._busy.within():
                staged = self._slab.stage_records(records[first : first + together])
            began, part = time.perf_counter(), at_hand[first : first + together]
            with self._writes([ticket for ticket, _ in part]) as writes:
                for (ticket, slot), array in zip(part, staged, strict=True):
                    ticket.state, ticket.staged = LoadState.COMMITTING, (array,)
                    writes.add(ticket, slot)
            self._count(staged_bytes=sum(array.nbytes for array in staged), commit_seconds=time.perf_counter() - began)
        return others

    def _load_through(
        self,
        wanted: Sequence[Place],
        waiting: dict[LoadTicket, int],
        on_progress: Callable[[int, int], None] | None,
    ) -> None:
        """`_load`, with the tickets that it has not taken care of in `waiting`."""
        remaining = iter(wanted)
        running: set[int] = set()  # layers whose commit may still run
        ahead = staged_ahead(self._window)  # as many again are being copied by the commit that runs
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
            self._half_written.sweep()  # an earlier ticket for one of these may have failed in the slot it goes to
            with self._writes(staged) as writes:
                for ticket in staged:
                    writes.add(ticket, waiting[ticket])
            running = {ticket.layer for ticket in staged}
            self._count(commit_seconds=time.perf_counter() - began)
            for ticket in over:
                if ticket in writes.unfinished:
                    continue  # its next round is queued
                del waiting[ticket]
                if ticket not in staged:
                    error = error or ticket.error or RuntimeError("the expert loader was closed while loading")
            done += len(writes.tickets)
            if on_progress is not None and writes.tickets:
                on_progress(done, len(wanted))
        if error is not None:
            raise error

    def _slot_for(self, ticket: LoadTicket) -> int | None:
        """Where a staged expert goes now, or None when there is no place or no need for it."""
        if ticket.slot is not None:
            return ticket.slot
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
                self._lose(layer, evicted)
                self._rebuild_if_lost(layer)
            cause = error if isinstance(error, Exception) else None
            for ticket in taken:
                if ticket.state is not LoadState.COMMITTING:
                    continue
                resident = ticket in writes.tickets and self._table.is_resident(ticket.layer, ticket.expert)
                self._queue.finish(ticket, LoadState.COMMITTED if resident else LoadState.FAILED, cause)
                self._count(loads=resident, failures=not resident)
            self._half_written.failed(writes)
            raise
        for ticket in writes.tickets:
            self._queue.finish(ticket, LoadState.COMMITTED)
        self._half_written.finished(writes.tickets)
        self._half_written.go_on(writes.unfinished)
        self._count(loads=len(writes.tickets), loaded_bytes=len(writes.tickets) * self._store.record_format.nbytes)

    def _rebuild_if_lost(self, layer: int) -> None:
        """Give a layer new arrays if it has none, without experts. Those it had are noted for `restore`."""
        if not self._slab.is_lost(layer):
            return
        self._half_written.drop(layer)
        experts = self._table.expert_of_slot(layer)
        self._lose(layer, [int(expert) for expert in experts[experts != EMPTY]])
        for slot in range(self._table.capacities[layer]):
            self._table.release(layer, slot)
        self._slab.rebuild(layer)

    def _lose(self, layer: int, experts: list[int]) -> None:
        """Have `restore` load these experts again."""
        self._lost.setdefault(layer, []).extend(experts)

    def _work(self) -> None:
        while (ticket := self._queue.next()) is not None:
            self._stage(ticket)

    def _stage(self, ticket: LoadTicket) -> None:
        """Bring a round of an expert to the device, the first time after reading it; whatever goes wrong ends in the
        ticket."""
        try:
            with self._busy.within():
                record = ticket.record
                if record is None:
                    record = self._store.read(ticket.layer, ticket.expert)
                if not ticket.is_last_round:
                    ticket.record = record
                staged = self._transfer(ticket, record)
        except Exception as error:
            again = ticket.attempts <= self._retries
            self._count(retries=int(again), failures=int(not again))
            self._queue.set_failed(ticket, error, self._backoff * 2 ** (ticket.attempts - 1) if again else None)
        else:
            kept = self._queue.set_ready(ticket, staged)
            self._count(staged_bytes=sum(array.nbytes for array in staged), wasted=int(not kept))

    def _transfer(self, ticket: LoadTicket, record: HostRecord) -> tuple[Num[Array, " numbers"], ...]:
        """Bring a round of a record to the device, over the modelled link where there is one."""
        if self._link is None:
            return self._slab.stage_round(record, ticket.round)
        with self._link.transfer(self._store.record_format.nbytes // ticket.rounds, lambda: ticket.urgent):
            return self._slab.stage_round(record, ticket.round)

    def _count(self, **increments: float) -> None:
        with self._lock:
            self._totals.update(increments)
