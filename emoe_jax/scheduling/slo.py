"""Admission by deadlines, expected work and shared experts: eMoE's task-aware scheduling (section 1.5, Algorithm 1).

Where the paper leaves a choice, or its rule would idle the machine:

- Algorithm 1 goes through the queue by stringency. Here that order counts only for sequences that must start now.
  While no sequence must, the shortest work goes first, which lowers the mean latency.
- A sequence that can no longer keep its deadlines is queued behind those that can.
- When nothing runs, a sequence is always admitted. One that has waited too long goes first, whatever it costs.
- Two exceptions admit a sequence although a running one then becomes late. First, when many sequences wait: idle places
  would make more of them late. Second, when the waiting sequence would itself become late by waiting.
- Prompts are started step by step, not all in one: each step's tokens come out at its end. How many seconds of prompts
  a step takes grows with the queue, so that a long queue is served at full throughput.
"""

import heapq
import itertools
import math
from collections.abc import Callable, Collection, Container, Iterator
from typing import Any

from emoe_jax.errors import ConfigError, SloUnattainable
from emoe_jax.requests.sequence import Sequence
from emoe_jax.scheduling.estimates import Estimates
from emoe_jax.scheduling.plan import PrefillChunk, StepPlan
from emoe_jax.scheduling.waiting import WaitingQueue

MAX_WAIT = 30.0
AGED = 0.75
"""From this share of the longest wait on a sequence goes first, so that a place comes free within the rest."""
PREFILL_STEPS = 2
"""A step computes prompts for as long as so many empty steps take, and one more for each waiting sequence."""
CROWDED = 0.5
"""When more wait than this share of the places, throughput counts: admissions may make running sequences late."""

LoadingSeconds = Callable[[Sequence], float]
"""`dE` of eMoE eq. 3: how long running sequences wait for the experts of an admitted one."""


def loads_nothing(sequence: Sequence) -> float:
    """0 seconds for every sequence: the loading time of an engine whose experts are all resident."""
    return 0.0


class SloPolicy:
    """Deadlines first, then little work. No sequence waits more than `max_wait` seconds while others like it end.

    A sequence whose deadlines were given up has `slo_unattainable`. One that is `strict` about them is refused when
    it comes, with `SloUnattainable`, if they cannot be kept with those ahead of it.
    """

    def __init__(
        self,
        estimates: Estimates,
        *,
        name: str = "slo",
        guarded: bool = True,
        max_wait: float = MAX_WAIT,
        loading_seconds: LoadingSeconds = loads_nothing,
    ):
        """`guarded` False: no start waits for the deadlines of running sequences (eq. 3)."""
        if not max_wait > 0:
            raise ConfigError(f"max_wait is {max_wait}; it must be above 0 seconds")
        self.name = name
        self.max_wait = max_wait
        self._guarded = guarded
        self._estimates = estimates
        self._loading_seconds = loading_seconds
        self._queue = WaitingQueue()
        self._unattainable = 0

    def __len__(self) -> int:
        return len(self._queue)

    @property
    def waiting(self) -> tuple[Sequence, ...]:
        """The waiting sequences by arrival, preempted ones first."""
        return tuple(self._queue)

    def next_up(self, places: int, now: float) -> list[Sequence]:
        """The likely next ones: a sequence that has waited too long, then by deadline and work. Changes nothing."""
        if not places or not len(self._queue):
            return []
        oldest, since = self._queue.oldest()
        likely = itertools.chain(
            [oldest] if self._is_aged(since, now) else [],
            self._choices(now),
        )
        return list(dict.fromkeys(itertools.islice(likely, places + 2)))[:places]  # the first two may come again

    def add(self, sequence: Sequence, running: Collection[Sequence]) -> None:
        """Queue the sequence by deadline and work.

        Raises `SloUnattainable`, queueing nothing, when its deadlines are strict and cannot be kept.
        """
        estimates = self._estimates
        estimates.expect(sequence)
        latest_start = estimates.latest_start(sequence)
        if sequence.slo.strict:
            self._check_attainable(sequence, latest_start, running)
        self._queue.add(sequence, latest_start, estimates.work(sequence))

    def put_back(self, sequence: Sequence) -> None:
        """Queue a preempted sequence before all others."""
        self._queue.add_first(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take the sequence out of the queue: it was started or ended."""
        self._queue.remove(sequence)

    def candidates(
        self, running: Collection[Sequence], planned: Collection[PrefillChunk], now: float
    ) -> Iterator[Sequence]:
        """Sequences to start, until computing their prompts takes as long as `PREFILL_STEPS` says a step may."""
        queue, estimates, cost = self._queue, self._estimates, self._estimates.model.cost
        spent = cost.prefill(sum(chunk.length for chunk in planned), len(planned)) if planned else 0.0
        budget = cost.step * (PREFILL_STEPS + len(queue))
        if spent and spent >= budget:
            return
        any_runs = bool(running)
        crowded = len(queue) > CROWDED * estimates.max_num_seqs
        guard = None if crowded or not self._guarded else _Guard(estimates, running, now)
        set_aside: set[Sequence] = set()
        while len(queue) > len(set_aside) and (not spent or spent < budget):
            oldest, since = queue.oldest(but=set_aside)
            if self._is_aged(since, now):
                sequence = oldest
            else:
                self._defer_late(now)
                allowed = (
                    choice
                    for choice in self._choices(now, per_task=1, but=set_aside)
                    if guard is None or not any_runs or guard.allows(choice, self._loading_seconds(choice))
                )
                sequence = next(allowed, None)
                if sequence is None:
                    return
            yield sequence
            if sequence in queue:
                set_aside.add(sequence)
                continue
            spent += estimates.prefill(sequence)  # without the pages that it took over
            if guard is not None:
                guard.admit(sequence)
            any_runs = True

    def observe(self, plan: StepPlan, seconds: float, waited: float = 0.0) -> None:
        """Learn from a step's time what tokens cost. `seconds` do not include the `waited` seconds."""
        self._estimates.observe(plan, seconds, waited)

    def ended(self, sequence: Sequence) -> None:
        """Learn from the length of the answer how long answers of its task are."""
        self._estimates.lengths.observe(sequence)

    def state(self) -> dict[str, Any]:
        """The queue's counts and all estimates. Times are in seconds; `max_wait_s` is None for no limit."""
        estimates = self._estimates
        return {
            "max_wait_s": self.max_wait if self.max_wait < math.inf else None,
            "late": self._queue.num_late,
            "unattainable": self._unattainable,
            "seconds_per_token": estimates.pace,
            "miss_wait_s": estimates.miss_wait,
            "cost": estimates.model.state(),
            "output_tokens": estimates.lengths.state(),
        }

    def _choices(self, now: float, per_task: int | None = None, but: Container[Sequence] = ()) -> Iterator[Sequence]:
        """The sequences to start, best first, without those in `but`.

        First comes the one that must start, then those of the least work (at most `per_task` of each task), then the
        late ones.
        """
        urgent, latest_start = self._queue.most_urgent()
        if urgent is not None and urgent not in but and latest_start < now + self._estimates.pace:
            yield urgent
        by_task = [
            _ordered(itertools.islice((entry for entry in ranked if entry[1] not in but), per_task))
            for ranked in self._queue.by_work()
        ]
        for _, _, sequence in heapq.merge(*by_task):
            yield sequence
        yield from itertools.islice((sequence for sequence in self._queue.late() if sequence not in but), per_task)

    def _is_aged(self, since: float, now: float) -> bool:
        return now - since >= AGED * self.max_wait

    def _defer_late(self, now: float) -> None:
        """Give up deadlines that cannot be kept any more."""
        while True:
            sequence, latest_start = self._queue.most_urgent()
            if sequence is None or latest_start >= now:
                return
            latest_start = self._estimates.latest_start(sequence)  # by what was learned since it came
            if latest_start >= now:
                self._queue.postpone(sequence, latest_start)
            else:
                self._queue.defer(sequence, self._estimates.work(sequence))
                sequence.slo_unattainable = True
                self._unattainable += 1

    def _check_attainable(self, sequence: Sequence, latest_start: float, running: Collection[Sequence]) -> None:
        """Raise `SloUnattainable` when a sequence, started after those due before it, would be late."""
        estimates = self._estimates
        start = max(sequence.arrival, sequence.queued_at)
        if len(running) >= estimates.max_num_seqs:
            start += min(estimates.remaining(other) for other in running) * estimates.pace
        start += sum(estimates.work(other) for other in self._queue if estimates.latest_start(other) <= latest_start)
        if start > latest_start:
            starts = estimates.latest_starts(sequence)
            name = min(starts, key=starts.__getitem__)
            deadline = getattr(sequence.slo, name)
            expected = _round_up(deadline + 1e3 * (start - latest_start))
            event = "the first token" if name == "ttft_ms" else "the end of the answer"
            raise SloUnattainable(f"{name} of {deadline} cannot be kept: {event} is expected after {expected} ms")


def _ordered(ranked: Iterator[tuple[float, Sequence]]) -> Iterator[tuple[float, int, Sequence]]:
    return ((work, sequence.order, sequence) for work, sequence in ranked)


def _round_up(number: float) -> str:
    """A positive number to three digits, never less than it is."""
    unit = 10.0 ** (math.floor(math.log10(number)) - 2)
    return f"{math.ceil(number / unit) * unit:.12g}"


class _Guard:
    """Keeps admissions of one step from making running sequences late for nothing: the first condition of Algorithm 1.

    It holds back only sequences that can wait.
    """

    def __init__(self, estimates: Estimates, running: Collection[Sequence], now: float):
        self._estimates = estimates
        self._now = now
        # What prompts, running or admitted in this step, put on top of decoding.
        self._delay = sum(estimates.prefill(sequence) for sequence in running if not sequence.decodes)
        # Slack without the delay, steps to the deadline's token, and when that is expected to be there.
        self._slacks: list[tuple[float, float, float]] = []
        for sequence in running:
            self._protect(sequence)

    def allows(self, sequence: Sequence, loading: float) -> bool:
        """Whether `sequence`, whose experts take `loading` seconds to come, may start beside those that run.

        eMoE eq. 3: it delays a running sequence by `dE`, by its prompt, and by its token in each step they share. If
        that makes some late, it waits for them, unless that makes it late itself: one for one is nothing gained.
        """
        delay = self._delay + loading + self._estimates.prefill(sequence)
        tokens, cost = self._estimates.remaining(sequence), self._estimates.model.cost
        harmed = [end for slack, theirs, end in self._slacks if slack < delay + cost.decode * min(tokens, theirs)]
        if not harmed or sequence.slo_unattainable:
            return not harmed
        return self._estimates.latest_start(sequence) < max(harmed)

    def admit(self, sequence: Sequence) -> None:
        """`sequence` starts."""
        self._delay += self._estimates.prefill(sequence)
        self._protect(sequence)

    def _protect(self, sequence: Sequence) -> None:
        """Watch over a sequence, if it has a deadline for its end, or for its first token, that can be kept."""
        if sequence.slo_unattainable:
            return
        first = self._estimates.first_token_slack(sequence, self._now)
        if self._delay <= first < math.inf:
            steps = self._estimates.prefill_steps(sequence)
            end = self._now + self._delay + steps * self._estimates.model.cost.step
            self._slacks.append((first, steps, end))
        slack = self._estimates.slack(sequence, self._now)
        if self._delay <= slack < math.inf:
            tokens = self._estimates.remaining(sequence)
            self._slacks.append((slack, tokens, self._now + self._delay + tokens * self._estimates.pace))
