"""The real scheduler on a virtual clock: a cost model stands for the device."""

import dataclasses
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


def simulate(
    jobs: Sequence[Job],
    device: Device,
    policy: AdmissionPolicy,
    seed: int = 0,
    max_tokens: int = 1000,
    experts: SimulatedExperts | None = None,
) -> list[Record]:
    """Run all jobs to their end; the policy does not know how long an answer will be. Records in order of arrival.

    As in the engine, a step is planned when the one before it begins: what comes meanwhile waits for the next. Without
    `experts`, all are resident.
    """
    scheduler = Scheduler(
        PagePool(device.kv_tokens // device.page_size + 1, device.page_size),
        device.max_num_seqs,
        device.max_num_batched_tokens,
        device.max_model_len,
        device.max_num_batched_tokens,
        (END,),
        policy,
    )
    rng = random.Random(seed)
    arriving = [
        (
            EngineSequence(
                str(index),
                [0] * min(job.sample.prompt_tokens, device.max_model_len - 2),
                SamplingParams(max_tokens=max(max_tokens, job.sample.output_tokens)),
                task=job.task,
                slo=job.slo,
                routing="resident" if experts is None else experts.routing,
                arrival=job.arrival,
            ),
            job,
        )
        for index, job in enumerate(sorted(jobs, key=lambda job: job.arrival))
    ]
    times: dict[EngineSequence, list[float]] = {sequence: [] for sequence, _ in arriving}
    started: dict[EngineSequence, float] = {}
    lengths = {sequence: job.sample.output_tokens for sequence, job in arriving}
    in_flight: deque[tuple[StepPlan, float, float]] = deque()  # when it ends, and how long it waits for experts

    def dispatch(now: float) -> None:
        if plan := scheduler.schedule(now):
            scheduler.dispatched(plan)
            for chunk in plan.prefills:
                started.setdefault(chunk.sequence, now)
            loads = StepLoads() if experts is None else experts.before_step(plan, scheduler, now)
            seconds = device.cost.of(plan) * max(0.5, rng.gauss(1.0, device.noise)) + sum(loads)
            in_flight.append((plan, (in_flight[-1][1] if in_flight else now) + seconds, loads.waited))

    now, following = 0.0, 0
    while following < len(arriving) or scheduler.has_work or in_flight:
        while following < len(arriving) and arriving[following][0].arrival <= now:
            scheduler.add(arriving[following][0])
            if experts is not None:
                experts.arrived(arriving[following][0])
            following += 1
        if not in_flight:
            dispatch(now)
        if not in_flight:
            now = arriving[following][0].arrival
            continue
        dispatch(now)
        before, (plan, now, waited) = now, in_flight.popleft()
        for sequence in (*plan.decodes, *(chunk.sequence for chunk in plan.prefills if chunk.is_last)):
            if not sequence.finished:
                times[sequence].append(now)
        for sequence in scheduler.update(plan, _result(plan, lengths), now - max(plan.now, before), waited=waited):
            if experts is not None:
                experts.ended(sequence)
    return [
        Record(job, tuple(times[sequence]), started[sequence], sequence.slo_unattainable) for sequence, job in arriving
    ]


def capacity(
    jobs: Sequence[Job], device: Device, policy: AdmissionPolicy, experts: SimulatedExperts | None = None
) -> float:
    """Requests/s that the machine finishes when all of them are there from the start."""
    records = simulate([dataclasses.replace(job, arrival=0.0) for job in jobs], device, policy, experts=experts)
    return len(records) / max(record.end for record in records)


def _result(plan: StepPlan, lengths: dict[EngineSequence, int]) -> StepResult:
    last = [chunk.sequence for chunk in plan.prefills if chunk.is_last]
    return StepResult(
        {
            sequence: SampledToken(END if len(sequence.generated) + 1 >= lengths[sequence] else 7)
            for sequence in (*plan.decodes, *last)
        }
    )
