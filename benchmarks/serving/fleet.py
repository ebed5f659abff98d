"""Several simulated engines on one virtual clock, behind a routing that chooses one for each request."""

import heapq
import math
import random
from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

from benchmarks.serving.report import Record, summary
from benchmarks.serving.simulate import SimulatedEngine
from benchmarks.serving.workload import Job
from emoe_jax.scheduling.replicas import Asked, Candidate, ReplicaRouting

WARM_UP = 0.2
"""Share of the requests that come before the measurement: residents and caches have to find their place."""
PUBLISH_SECONDS = 0.25
"""Between two publications of a replica. They are spread evenly over the replicas."""
PREFIX_TOKENS = 32
"""Of a prompt, by which `prefix-affine` knows it: two pages of the prefix cache."""


class Counters(NamedTuple):
    """Totals over all replicas."""

    wished: int
    covered: int
    loads: int
    looked_up: int
    cached: int


class Fleet:
    """Replicas, and what the router knows of them: loads at once, what they serve when they publish it."""

    def __init__(
        self,
        engines: Sequence[SimulatedEngine],
        routing: ReplicaRouting,
        seed: int = 0,
        publish_seconds: float = PUBLISH_SECONDS,
    ):
        self.engines = engines
        self.assigned = [0] * len(engines)
        """Requests that each replica got since the measurement began."""
        self._routing, self._rng = routing, random.Random(seed)
        self._candidates = [Candidate(f"replica {index}", 0) for index in range(len(engines))]
        self._due: list[tuple[float, int]] = []  # of engines whose step runs
        self._publish_gap = publish_seconds / len(engines)
        self._published, self._publish_at = 0, 0.0

    def run(self, jobs: Sequence[Job]) -> dict[str, Any]:
        """Answer all jobs. The numbers are of those after the warm-up."""
        jobs = sorted(jobs, key=lambda job: job.arrival)
        first = int(WARM_UP * len(jobs))
        before = self._counters()
        now, woken = 0.0, set[int]()
        for index, job in enumerate(jobs):
            if job.arrival > now:
                self._wake(woken, now)
                self._advance(job.arrival)
                now = job.arrival
                self._publish(now)
            if index == first:
                before, self.assigned = self._counters(), [0] * len(self.engines)
            woken.add(self._assign(job))
        self._wake(woken, now)
        self._advance(math.inf)
        records = [record for engine in self.engines for record in engine.records()]
        records.sort(key=lambda record: record.job.arrival)
        return self._found(records[first:], before)

    def _assign(self, job: Job) -> int:
        prefix = array("I", job.sample.tokens[:PREFIX_TOKENS]).tobytes()
        chosen = self._routing.choose(self._candidates, Asked(job.task, prefix), self._rng)
        index = int(chosen.name.removeprefix("replica "))
        self.engines[index].arrive(job)
        self.assigned[index] += 1
        self._note_load(index)
        return index

    def _wake(self, woken: set[int], now: float) -> None:
        """Begin steps of the engines that got requests, as far as none runs."""
        for index in sorted(woken):
            engine = self.engines[index]
            if engine.due == math.inf:
                engine.wake(now)
                self._await(index)
        woken.clear()

    def _advance(self, until: float) -> None:
        """End all steps that are due before `until`."""
        while self._due and self._due[0][0] < until:
            _, index = heapq.heappop(self._due)
            self.engines[index].advance()
            self._note_load(index)
            self._await(index)

    def _await(self, index: int) -> None:
        if self.engines[index].due < math.inf:
            heapq.heappush(self._due, (self.engines[index].due, index))

    def _publish(self, now: float) -> None:
        """Replicas whose turn has come say what they serve."""
        turns = int((now - self._publish_at) / self._publish_gap)
        for turn in range(min(turns, len(self.engines))):  # more turns would say the same again
            index = (self._published + turn) % len(self.engines)
            experts = self.engines[index].experts
            if experts is not None:
                self._candidates[index] = self._candidates[index]._replace(serves=experts.serves())
        self._published = (self._published + turns) % len(self.engines)
        self._publish_at += turns * self._publish_gap

    def _note_load(self, index: int) -> None:
        unfinished = self.engines[index].unfinished
        if self._candidates[index].load != unfinished:
            self._candidates[index] = self._candidates[index]._replace(load=unfinished)

    def _counters(self) -> Counters:
        experts = [engine.experts for engine in self.engines if engine.experts is not None]
        caches = [engine.scheduler.prefix_cache.state() for engine in self.engines]
        return Counters(
            sum(one.wished for one in experts),
            sum(one.covered for one in experts),
            sum(one.loads.loads for one in experts),
            sum(cache["prefix_query_tokens"] for cache in caches),
            sum(cache["prefix_hit_tokens"] for cache in caches),
        )

    def _found(self, records: Sequence[Record], before: Counters) -> dict[str, Any]:
        """`coverage` is None if all experts are resident; `busiest` is the most requests of a replica over the mean."""
        wished, covered, loads, looked_up, cached = (
            now - then for now, then in zip(self._counters(), before, strict=True)
        )
        return {
            **summary(records),
            "coverage": covered / wished if wished else None,
            "loads_per_request": loads / len(records),
            "cached_tokens": cached / looked_up if looked_up else 0.0,
            "busiest": max(self.assigned) * len(self.engines) / len(records),
        }
