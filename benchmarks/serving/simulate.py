"""The real scheduler on a virtual clock: a cost model stands for the device."""

import dataclasses
import math
import random
from collections import deque
from collections.abc import Sequence

from benchmarks.serving.devices import Device
from benchmarks.serving.experts import SimulatedExperts, StepLoads
from benchmarks.serving.report import Record
from benchmarks.serving.workload import Job
from emoe_jax.requests.request import SamplingParams
from emoe_jax.requests.sequence import Sequence as EngineSequence
from emoe_jax.scheduling.pages import PagePool
from emoe_jax.scheduling.plan import SampledToken, StepPlan, StepResult
from emoe_jax.scheduling.policy import AdmissionPolicy
from emoe_jax.scheduling.scheduler import Scheduler

END = 1
"""The fake model's end of sequence; its other tokens are 7."""
MAX_TOKENS = 1000
"""Of answers. The policy does not know how long one will be."""


class SimulatedEngine:
    """One engine. `arrive` with requests in order of arrival, `wake` after those of one moment, and `advance` whenever
    the clock has come to `due`.

    As in the engine, a step is planned when the one before it begins: what comes meanwhile waits for the next. Without
    `experts`, all are resident.
    """

    def __init__(
        self,
        device: Device,
        policy: AdmissionPolicy,
        seed: int = 0,
        max_tokens: int = MAX_TOKENS,
        experts: SimulatedExperts | None = None,
        prefix_caching: bool = False,
    ):
        self.experts = experts
        self.scheduler = Scheduler(
            PagePool(device.kv_tokens // device.page_size + 1, device.page_size),
            device.max_num_seqs,
            device.max_num_batched_tokens,
            device.max_model_len,
            device.max_num_batched_tokens,
            (END,),
            policy,
            prefix_caching=prefix_caching,
        )
        self._device, self._max_tokens = device, max_tokens
        self._rng = random.Random(seed)
        self._jobs: dict[EngineSequence, Job] = {}
        self._times: dict[EngineSequence, list[float]] = {}
        self._started: dict[EngineSequence, float] = {}
        self._arrived: list[EngineSequence] = []  # not yet seen by the scheduler
        self._in_flight: deque[tuple[StepPlan, float, float]] = deque()  # when it ends, how long it waits for experts
        self._now = 0.0
        self.unfinished = 0
        """Requests that came and have not ended."""

    @property
    def due(self) -> float:
        """When the step that runs ends, in seconds; infinite without one."""
        return self._in_flight[0][1] if self._in_flight else math.inf

    def arrive(self, job: Job) -> None:
        """A request comes."""
        sample = job.sample
        sequence = EngineSequence(
            str(len(self._jobs)),
            list(sample.tokens or [0] * sample.prompt_tokens)[: self._device.max_model_len - 2],
            SamplingParams(max_tokens=max(self._max_tokens, sample.output_tokens)),
            task=job.task,
            slo=job.slo,
            routing="resident" if self.experts is None else self.experts.routing,
            arrival=job.arrival,
        )
        self._jobs[sequence] = job
        self._times[sequence] = []
        self._arrived.append(sequence)
        self.unfinished += 1

    def wake(self, now: float) -> None:
        """Begin a step if none runs."""
        if not self._in_flight:
            self._now = now
            self._admit()
            self._dispatch(now)
            if self._in_flight:
                self._dispatch(now)

    def advance(self) -> None:
        """End the step that runs, at `due`, and begin the next one."""
        before, (plan, now, waited) = self._now, self._in_flight.popleft()
        self._now = now
        for sequence in (*plan.decodes, *(chunk.sequence for chunk in plan.prefills if chunk.is_last)):
            if not sequence.finished:
                self._times[sequence].append(now)
        result, seconds = _result(plan, self._jobs), now - max(plan.now, before)
        for sequence in self.scheduler.update(plan, result, seconds, waited=waited):
            self.unfinished -= 1
            if self.experts is not None:
                self.experts.ended(sequence)
        self._admit()
        if not self._in_flight:
            self._dispatch(now)
        if self._in_flight:
            self._dispatch(now)

    def records(self) -> list[Record]:
        """Of all requests, which have ended, in order of arrival."""
        return [
            Record(job, tuple(self._times[sequence]), self._started[sequence], sequence.slo_unattainable)
            for sequence, job in self._jobs.items()
        ]

    def _admit(self) -> None:
        for sequence in self._arrived:
            self.scheduler.add(sequence)
            if self.experts is not None:
                self.experts.arrived(sequence)
        self._arrived.clear()

    def _dispatch(self, now: float) -> None:
        if plan := self.scheduler.schedule(now):
            self.scheduler.dispatched(plan)
            for chunk in plan.prefills:
                self._started.setdefault(chunk.sequence, now)
            loads = StepLoads() if self.experts is None else self.experts.before_step(plan, self.scheduler, now)
            noise = max(0.5, self._rng.gauss(1.0, self._device.noise))
            seconds = self._device.cost.of(plan) * noise + sum(loads)
            begins = self._in_flight[-1][1] if self._in_flight else now
            self._in_flight.append((plan, begins + seconds, loads.waited))


def simulate(
    jobs: Sequence[Job],
    device: Device,
    policy: AdmissionPolicy,
    seed: int = 0,
    max_tokens: int = MAX_TOKENS,
    experts: SimulatedExperts | None = None,
) -> list[Record]:
    """Run all jobs to their end on one engine. Records in order of arrival."""
    engine = SimulatedEngine(device, policy, seed, max_tokens, experts)
    now = 0.0
    for job in sorted(jobs, key=lambda job: job.arrival):
        if job.arrival > now:
            engine.wake(now)
            while engine.due < job.arrival:
                engine.advance()
            now = job.arrival
        engine.arrive(job)
    engine.wake(now)
    while engine.due < math.inf:
        engine.advance()
    return engine.records()


def capacity(
    jobs: Sequence[Job], device: Device, policy: AdmissionPolicy, experts: SimulatedExperts | None = None
) -> float:
    """Requests/s that the machine finishes when all of them are there from the start."""
    records = simulate([dataclasses.replace(job, arrival=0.0) for job in jobs], device, policy, experts=experts)
    return len(records) / max(record.end for record in records)


def _result(plan: StepPlan, jobs: dict[EngineSequence, Job]) -> StepResult:
    last = [chunk.sequence for chunk in plan.prefills if chunk.is_last]
    return StepResult(
        {
            sequence: SampledToken(
                END if len(sequence.generated) + 1 >= jobs[sequence].sample.output_tokens else 7,
            )
            for sequence in (*plan.decodes, *last)
        }
    )
