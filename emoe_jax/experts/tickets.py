"""Requests for experts, and the queue in which they wait for a worker, a retry or the next commit."""

import enum
import heapq
import itertools
import math
import sys
import threading
import time
from collections.abc import Callable, Iterable

import jax
import numpy as np
from jaxtyping import Bool

from emoe_jax.errors import ConfigError
from emoe_jax.experts.pieces import HostRecord


class LoadState(enum.Enum):
    """Where a ticket is on its way. The last four states are final."""

    QUEUED = "queued"
    STAGING = "staging"
    READY = "ready"
    COMMITTING = "committing"
    COMMITTED = "committed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    STALE = "stale"
    """Staged, but at commit time the expert was resident already or the one to replace was gone."""


_CANCELLABLE = (LoadState.QUEUED, LoadState.STAGING, LoadState.READY)


class LoadTicket:
    """One expert on its way to the slab. Callers read it; only the queue and the loader change it."""

    def __init__(self, layer: int, expert: int, priority: float, evict: int | None, rounds: int = 1):
        self.layer = layer
        self.expert = expert
        self.priority = priority
        self.evict = evict
        self.state = LoadState.QUEUED
        self.attempts = 0
        self.error: Exception | None = None
        self.staged: tuple[jax.Array, ...] | None = None
        """One round of it: pieces, or the whole record."""
        self.rounds = rounds
        self.round = 0
        """The round that is staged next, or is. The ones before it are written."""
        self.record: HostRecord | None = None
        """What rounds are cut from, once there was a first one and while more are to come."""
        self.slot: int | None = None
        """Where it is being written, once a round was. A ticket that has a slot is no more cancelled."""
        self.evicted: int | None = None
        """The expert that was there before."""
        self.urgent = False
        self.delayed = False
        self.entry = 0

    @property
    def is_active(self) -> bool:
        """Whether it may still be given up, or committed."""
        return self.state in _CANCELLABLE

    @property
    def is_last_round(self) -> bool:
        """Whether the expert is whole once this round of it is written."""
        return self.round == self.rounds - 1

    def __repr__(self) -> str:
        return f"LoadTicket(layer={self.layer}, expert={self.expert}, priority={self.priority}, {self.state.value})"


class TicketQueue:
    """Thread-safe. At most one active ticket per expert; highest priority first, then first come.

    Experts come in `rounds`, small ones in one. Ordinary tickets start a round only while fewer than `window` of them
    are staged or staging, and no faster than `bandwidth` bytes/s (`None`: unlimited). Experts that are written in part
    come first, so that few slots hold none. Urgent tickets, for which a thread is waiting, bypass all that.
    """

    def __init__(self, record_bytes: int, window: int, bandwidth: float | None, rounds: int = 1):
        if bandwidth is not None and not bandwidth > 0:
            raise ConfigError(f"link bandwidth of {bandwidth:g} bytes/s must be positive")
        if window < 1:
            raise ValueError(f"a window of {window} staged experts lets nothing through; it must be at least 1")
        self._seconds_per_round = 0.0 if bandwidth is None else record_bytes / rounds / bandwidth
        self._rounds = rounds
        self._window = window
        self._lock = threading.RLock()
        self._work = threading.Condition(self._lock)  # workers wait here
        self._progress = threading.Condition(self._lock)  # threads wait here for urgent tickets
        self._idle = threading.Condition(self._lock)  # and here for all of them
        self._entries = itertools.count(1)
        self._tickets: dict[tuple[int, int], LoadTicket] = {}  # active ones
        # Heaps of (rank, entry, ticket). A ticket that moved on leaves its old entry behind, see `_first`.
        self._waiting: list[tuple[float, int, LoadTicket]] = []  # for a worker, by -priority
        self._delayed: list[tuple[float, int, LoadTicket]] = []  # for their next attempt, by time
        self._ready: list[LoadTicket] = []
        self._between: set[LoadTicket] = set()  # taken, with rounds to come: they keep their room in the window
        self._staging = 0
        self._link_free_at = 0.0
        self._closed = False
        self.on_settled: Callable[[], None] | None = None
        """Called from a worker's thread, under a lock, when it has staged something and has no more to do."""

    def request(
        self,
        layer: int,
        expert: int,
        priority: float,
        evict: int | None = None,
        *,
        urgent: bool = False,
        wake: bool = True,
    ) -> LoadTicket:
        """A new ticket, or the expert's active one with the higher priority and the newer `evict`.

        `wake=False` leaves sleeping workers alone, for a caller that goes on to stage the ticket itself.
        """
        with self._lock:
            if self._closed:
                raise RuntimeError("the expert loader is closed")
            ticket = self._tickets.get((layer, expert))
            if ticket is None:
                ticket = self._tickets[layer, expert] = LoadTicket(layer, expert, priority, evict, self._rounds)
                self._push(ticket, wake)
            ticket.evict = evict if evict is not None else ticket.evict
            if priority > ticket.priority or (urgent and not ticket.urgent):
                ticket.priority = max(ticket.priority, priority)
                ticket.urgent |= urgent
                # A read that waits to be tried again keeps its distance, unless a thread waits for it.
                if ticket.state is LoadState.QUEUED and (urgent or not ticket.delayed):
                    self._push(ticket, wake)
            return ticket

    def has(self, layer: int, expert: int) -> bool:
        """Whether an active ticket is for this expert."""
        with self._lock:
            return (layer, expert) in self._tickets

    def next(self) -> LoadTicket | None:
        """Block until a ticket may be staged; None once the queue is closed. For worker threads."""
        with self._lock:
            while not self._closed:
                now = time.monotonic()
                while (retry := _first(self._delayed)) is not None and self._delayed[0][0] <= now:
                    heapq.heappop(self._delayed)
                    self._push(retry)
                wait_until = self._delayed[0][0] if self._delayed else math.inf
                ticket = _first(self._waiting)
                if ticket is not None:
                    if ticket.urgent or (self._has_room() and now >= self._link_free_at):
                        return self._start(ticket, now)
                    if self._has_room():
                        wait_until = min(wait_until, self._link_free_at)
                self._work.wait(None if wait_until == math.inf else max(0.0, wait_until - now))
            return None

    def next_urgent(self) -> LoadTicket | None:
        """An urgent ticket to be staged, if one waits; never blocks. For the thread that is waiting for it."""
        with self._lock:
            ticket = _first(self._waiting)
            return self._start(ticket, 0.0) if ticket is not None and ticket.urgent else None

    def set_ready(self, ticket: LoadTicket, staged: tuple[jax.Array, ...]) -> bool:
        """The worker has staged it. False when it was cancelled in the meantime and the work is lost."""
        with self._lock:
            self._staging -= 1
            kept = ticket.state is LoadState.STAGING
            if kept:
                ticket.state, ticket.staged = LoadState.READY, staged
                self._ready.append(ticket)
            else:
                self._wake_workers()
            self._moved(ticket)
            self._tell_settled()
            return kept

    def set_failed(self, ticket: LoadTicket, error: Exception, retry_after: float | None) -> None:
        """The worker could not stage it: queue it again in `retry_after` seconds, or give up on None."""
        with self._lock:
            self._staging -= 1
            ticket.error = error
            if ticket.state is LoadState.STAGING:
                if retry_after is None:
                    self._finish(ticket, LoadState.FAILED)
                else:
                    ticket.state, ticket.entry, ticket.delayed = LoadState.QUEUED, next(self._entries), True
                    heapq.heappush(self._delayed, (time.monotonic() + retry_after, ticket.entry, ticket))
            self._wake_workers()
            self._moved(ticket)
            self._tell_settled()

    @property
    def has_ready(self) -> bool:
        """Whether some ticket, urgent or not, is staged. Takes no lock, so the answer may be a moment old."""
        return bool(self._ready)

    def take_ready(self) -> list[LoadTicket]:
        """Everything staged and not urgent, most urgent first. Return each by `finish`."""
        with self._lock:
            taken = sorted((ticket for ticket in self._ready if not ticket.urgent), key=_order)
            self._ready = [ticket for ticket in self._ready if ticket.urgent]
            self._taken(taken)
            self._wake_workers()
            return taken

    def go_on(self, ticket: LoadTicket) -> None:
        """A round of a taken ticket was written, and more are to come: queue the next one."""
        with self._lock:
            ticket.staged = None
            self._between.discard(ticket)
            if self._closed:
                self._finish(ticket, LoadState.CANCELLED)
                return
            ticket.round, ticket.attempts, ticket.state = ticket.round + 1, 0, LoadState.QUEUED
            self._push(ticket)

    def finish(self, ticket: LoadTicket, state: LoadState, error: Exception | None = None) -> None:
        """End a ticket in this final state and drop what is staged. Without `error` it keeps the error it has."""
        with self._lock:
            if ticket in self._ready:
                self._ready.remove(ticket)
            ticket.error = error or ticket.error
            self._finish(ticket, state)

    def give_up(self, tickets: Iterable[LoadTicket]) -> None:
        """Cancel tickets that no thread waits for any more, urgent and taken ones too. Final states stay."""
        with self._lock:
            for ticket in tickets:
                if self._tickets.get((ticket.layer, ticket.expert)) is ticket:
                    if ticket in self._ready:
                        self._ready.remove(ticket)
                    self._finish(ticket, LoadState.CANCELLED)
                    self._moved(ticket)
            self._wake_workers()

    def wait_any(self, tickets: Iterable[LoadTicket]) -> list[LoadTicket]:
        """Block until at least one of the urgent tickets is staged or over; those, with the staged ones taken."""
        tickets = list(tickets)
        waiting = (LoadState.QUEUED, LoadState.STAGING)
        with self._lock:
            self._progress.wait_for(lambda: any(ticket.state not in waiting for ticket in tickets))
            done = [ticket for ticket in tickets if ticket.state not in waiting]
            self._ready = [ticket for ticket in self._ready if ticket not in done]
            self._wake_workers()
            return self._taken(done)

    def cancel(self, ticket: LoadTicket) -> bool:
        """False when the ticket is over already, written in part, or when a thread is waiting for it."""
        with self._lock:
            return self._cancel(ticket)

    def wait_idle(self, timeout: float | None) -> bool:
        """Wait until workers can do nothing more before the next commit; False when `timeout` seconds ran out."""
        with self._lock:
            return self._idle.wait_for(self._is_idle, timeout)

    def in_flight(self, num_layers: int, num_experts: int) -> Bool[np.ndarray, "M E"]:
        """Experts on their way in, and those they are to replace."""
        mask = np.zeros((num_layers, num_experts), bool)
        with self._lock:
            for ticket in self._tickets.values():
                mask[ticket.layer, ticket.expert] = True
                if ticket.evict is not None:
                    mask[ticket.layer, ticket.evict] = True
        return mask

    def close(self) -> None:
        """Cancel all tickets but those being committed and wake every waiting thread. `request` raises from then on."""
        with self._lock:
            self._closed = True
            for ticket in list(self._tickets.values()):
                if ticket.state is not LoadState.COMMITTING:
                    self._finish(ticket, LoadState.CANCELLED)
            self._ready.clear()
            for condition in (self._work, self._progress, self._idle):
                condition.notify_all()

    def _push(self, ticket: LoadTicket, wake: bool = True) -> None:
        ticket.entry, ticket.delayed = next(self._entries), False
        rank = -ticket.priority if ticket.slot is None else -sys.float_info.max
        heapq.heappush(self._waiting, (-math.inf if ticket.urgent else rank, ticket.entry, ticket))
        if wake:
            self._work.notify_all()

    def _taken(self, tickets: list[LoadTicket]) -> list[LoadTicket]:
        """From here on only the owner of the step decides about the staged ones: they cannot be cancelled."""
        for ticket in tickets:
            if ticket.state is LoadState.READY:
                ticket.state = LoadState.COMMITTING
                if not ticket.is_last_round:
                    self._between.add(ticket)
        return tickets

    def _wake_workers(self) -> None:
        """After room was made. Not when nothing waits: waking a thread costs more than all else here."""
        if self._waiting or self._delayed:
            self._work.notify_all()

    def _moved(self, ticket: LoadTicket) -> None:
        """Wake the threads that wait for this ticket only: others would take turns with the worker for every expert."""
        if ticket.urgent:
            self._progress.notify_all()
        if self._is_idle():
            self._idle.notify_all()

    def _tell_settled(self) -> None:
        if self.on_settled is not None and self._ready and self._is_idle():
            self.on_settled()

    def _is_idle(self) -> bool:
        waiting = _first(self._waiting) or _first(self._delayed)
        return not self._staging and not (waiting and self._has_room())

    def _has_room(self) -> bool:
        return self._staging + len(self._ready) + len(self._between) < self._window

    def _start(self, ticket: LoadTicket, now: float) -> LoadTicket:
        heapq.heappop(self._waiting)
        ticket.state = LoadState.STAGING
        ticket.attempts += 1
        self._staging += 1
        if not ticket.urgent:
            self._link_free_at = max(now, self._link_free_at) + self._seconds_per_round
        return ticket

    def _cancel(self, ticket: LoadTicket) -> bool:
        if ticket.state not in _CANCELLABLE or ticket.urgent or ticket.slot is not None:
            return False
        if ticket.state is LoadState.READY:
            self._ready.remove(ticket)
        self._finish(ticket, LoadState.CANCELLED)
        self._wake_workers()
        self._moved(ticket)
        return True

    def _finish(self, ticket: LoadTicket, state: LoadState) -> None:
        ticket.state, ticket.staged, ticket.record = state, None, None
        self._between.discard(ticket)
        if self._tickets.get((ticket.layer, ticket.expert)) is ticket:
            del self._tickets[ticket.layer, ticket.expert]


def _first(heap: list[tuple[float, int, LoadTicket]]) -> LoadTicket | None:
    """The heap's first ticket, after dropping entries of tickets that were cancelled, started or moved elsewhere."""
    while heap:
        _, entry, ticket = heap[0]
        if ticket.state is LoadState.QUEUED and ticket.entry == entry:
            return ticket
        heapq.heappop(heap)
    return None


def _order(ticket: LoadTicket) -> tuple[float, int]:
    return (-ticket.priority, ticket.entry)
