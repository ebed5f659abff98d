"""An engine that has nothing else to do commits what was staged."""

import asyncio
import time

import numpy as np
import pytest

from emoe_jax import Engine, SamplingParams
from emoe_jax.policies.rule import ExpectedWishes
from serve.worker import EngineWorker
from tests.engines import EngineFactory


def wanted(engine: Engine) -> list[int]:
    """Plan for three experts that are absent from layer 0, and for what is there elsewhere."""
    residency = engine.parts.residency
    mask = residency.table.resident_mask
    rates = mask.astype(np.float32)
    experts = np.flatnonzero(~mask[0])[:3]
    rates[0] = 0
    rates[0, experts] = 1
    residency.plan(ExpectedWishes(rates, rates, 0.0))
    return experts.tolist()


@pytest.fixture
def engine(engine_of: EngineFactory) -> Engine:
    engine = engine_of(expert_memory="3 slots", policy="emoe")
    engine.generate([1, 2, 3], SamplingParams(max_tokens=2))
    engine.parts.residency.settle(10)
    return engine


def test_the_state_of_an_idle_engine_shows_what_was_staged(engine: Engine) -> None:
    experts = wanted(engine)
    deadline = time.monotonic() + 20
    while engine.state()["residency"]["loading"] and time.monotonic() < deadline:
        time.sleep(0.001)
    assert engine.state()["residency"]["experts"][0] == experts


def test_a_step_without_work_commits(engine: Engine) -> None:
    experts = wanted(engine)
    deadline = time.monotonic() + 20
    while engine.parts.residency.table.resident(0).tolist() != experts and time.monotonic() < deadline:
        assert not engine.has_work()
        assert engine.step() == []
    assert engine.parts.residency.table.resident(0).tolist() == experts


@pytest.mark.parametrize("staged_before", [False, True])
def test_a_sleeping_worker_is_woken_by_loads(engine: Engine, staged_before: bool) -> None:
    """Loads that settle while the worker sleeps, and those that had settled before it was started."""

    async def scenario() -> None:
        worker = EngineWorker(engine, 8)
        experts = []
        if staged_before:
            residency, deadline = engine.parts.residency, time.monotonic() + 20
            staged = residency.loads.staged_bytes + 3 * residency.expert_bytes
            experts = wanted(engine)
            while residency.loads.staged_bytes < staged and time.monotonic() < deadline:
                time.sleep(0.001)
        worker.start()
        try:
            if not staged_before:
                experts = await worker.call(lambda _: wanted(engine))
            deadline = time.monotonic() + 20
            while engine.parts.residency.table.resident(0).tolist() != experts and time.monotonic() < deadline:
                await asyncio.sleep(0.01)
            assert engine.parts.residency.table.resident(0).tolist() == experts
        finally:
            assert worker.stop(20)

    asyncio.run(scenario())
