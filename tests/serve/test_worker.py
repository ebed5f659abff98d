"""What the worker hands out at a time, and its way out: draining, and a drain that is told to hurry."""

import asyncio

import pytest

from emoe_jax import SamplingParams
from serve.metrics import RequestMetrics
from serve.stats import RequestStats
from serve.worker import MAX_BATCH, EngineWorker, Submission, Unavailable
from tests.serve.fake import FakeEngine, FakeTokenizer


def test_who_has_not_read_for_long_gets_a_part_at_a_time() -> None:
    async def scenario() -> None:
        worker = EngineWorker(FakeEngine(FakeTokenizer()), 8)
        worker.start()
        try:
            submission = Submission([1, 104], SamplingParams(max_tokens=90))
            generation = worker.submit([submission], RequestStats(RequestMetrics()))
            while worker.requests:
                await asyncio.sleep(0.01)
            await generation.accepted()
            assert [len(batch) async for batch in generation.batches()] == [MAX_BATCH, 90 - MAX_BATCH]
        finally:
            worker.stop()

    asyncio.run(scenario())


@pytest.mark.parametrize("hurried", [False, True])
def test_a_hurried_drain_fails_what_runs_at_once(hurried: bool) -> None:
    async def scenario() -> None:
        worker = EngineWorker(FakeEngine(FakeTokenizer(), step_seconds=0.02), 8)
        worker.start()
        try:
            submission = Submission([1, 104], SamplingParams(max_tokens=40))
            generation = worker.submit([submission], RequestStats(RequestMetrics()))
            await generation.accepted()
            draining = asyncio.ensure_future(worker.drain(30))
            await asyncio.sleep(0.05)
            worker.hurried = hurried  # what the handler of a second signal does
            if hurried:
                with pytest.raises(Unavailable):
                    await generation.outputs()
            else:
                assert len((await generation.outputs())[0].token_ids) == 40
            await draining
        finally:
            worker.stop()

    asyncio.run(scenario())
