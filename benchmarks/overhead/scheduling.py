"""Work of the scheduler alone: thousands of requests at once, steps that take what a cost model says, no device."""

import random
import time
from collections.abc import Callable

from emoe_jax.requests.request import SLO, SamplingParams
from emoe_jax.requests.sequence import Sequence
from emoe_jax.scheduling.cost import StepCost
from emoe_jax.scheduling.pages import PagePool
from emoe_jax.scheduling.plan import SampledToken, StepPlan, StepResult
from emoe_jax.scheduling.registry import SCHEDULING_POLICIES, make_admission_policy
from emoe_jax.scheduling.scheduler import Scheduler

PLACES, STEP_TOKENS, MODEL_LEN, CHUNK, PAGES = 64, 512, 512, 128, 4096
COST = StepCost(step=0.010, chunk=0.0, prefill_token=0.0001, decode=0.001)
SLOS = (SLO(), SLO(ttft_ms=2000), SLO(latency_ms=60_000), SLO(ttft_ms=60_000, latency_ms=600_000))


def scheduler_overhead(requests: int = 10_000) -> dict[str, float]:
    """Seconds that scheduling so many requests takes, all of them waiting at once, by policy."""
    return {f"{policy}_seconds_for_{requests}_requests": _seconds(policy, requests) for policy in SCHEDULING_POLICIES}


def schedule_all(policy: str, requests: int, measured: Callable[[Callable[[], object]], None]) -> Scheduler:
    """Schedules requests of five tasks until all have ended; whatever the scheduler does, `measured` runs it."""
    scheduler = Scheduler(PagePool(PAGES + 1, 16), PLACES, STEP_TOKENS, MODEL_LEN, CHUNK)
    scheduler.use_policy(make_admission_policy(policy, scheduler))
    rng = random.Random(0)
    sequences = [
        Sequence(
            str(index),
            [3] * rng.randint(1, 200),
            SamplingParams(max_tokens=rng.randint(1, 32)),
            task=rng.choice("abcde"),
            slo=rng.choice(SLOS),
        )
        for index in range(requests)
    ]

    def add() -> None:
        for sequence in sequences:
            scheduler.add(sequence)

    measured(add)
    now = 0.0
    plan = StepPlan()

    def schedule() -> None:
        nonlocal plan
        plan = scheduler.schedule(now)

    while scheduler.has_work:
        measured(schedule)
        last = [chunk.sequence for chunk in plan.prefills if chunk.is_last]
        result = StepResult({sequence: SampledToken(7) for sequence in (*plan.decodes, *last)})
        seconds = COST.of(plan)
        now += seconds
        measured(lambda plan=plan, result=result, seconds=seconds: scheduler.update(plan, result, seconds))
    return scheduler


def _seconds(policy: str, requests: int) -> float:
    spent = 0.0

    def timed(work: Callable[[], object]) -> None:
        nonlocal spent
        began = time.perf_counter()
        work()
        spent += time.perf_counter() - began

    schedule_all(policy, requests, timed)
    return spent
