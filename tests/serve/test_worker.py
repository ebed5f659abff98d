"""What the worker hands out at a time, and its way out: draining, and a drain that is told to hurry."""

import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from emoe_jax import RequestError, SamplingParams
from emoe_jax.requests.request import Delta
from serve.generation import MAX_BATCH, Submission
from serve.refusals import QueueFull, Unavailable
from serve.telemetry.metrics import RequestMetrics
from serve.telemetry.stats import RequestStats
from serve.worker import ADMISSION_SECONDS, EngineWorker
from tests.serve.fake import FakeEngine, FakeTokenizer


def new_stats() -> RequestStats:
    return RequestStats(RequestMetrics())


def test_who_has_not_read_for_long_gets_a_part_at_a_time() -> None:
    async def scenario() -> None:
        worker = EngineWorker(FakeEngine(FakeTokenizer()), 8)
        worker.start()
        try:
            submission = Submission([1, 104], SamplingParams(max_tokens=90))
            generation = worker.submit([submission], new_stats())
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
            generation = worker.submit([submission], new_stats())
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


def test_a_request_that_comes_during_a_chore_is_answered_before_the_next_one() -> None:
    async def scenario() -> None:
        engine = FakeEngine(FakeTokenizer())
        begun, go_on, ended = threading.Event(), threading.Event(), threading.Event()
        seen: list[tuple[int, bool]] = []

        def chores() -> Iterator[None]:
            begun.set()
            go_on.wait(10)
            yield
            seen.append((len(engine.requests), engine.has_work()))
            yield
            ended.set()

        worker = EngineWorker(engine, 8, chores=chores())
        worker.start()
        try:
            assert await asyncio.to_thread(begun.wait, 10)
            generation = worker.submit([Submission([1, 104], SamplingParams(max_tokens=3))], new_stats())
            go_on.set()
            assert len((await generation.outputs())[0].token_ids) == 3
            assert await asyncio.to_thread(ended.wait, 10)  # without another request
        finally:
            worker.stop()
        assert seen == [(1, False)]

    asyncio.run(scenario())


def test_a_chore_that_fails_leaves_the_rest_undone_and_the_worker_alive(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        def chores() -> Iterator[None]:
            raise OSError("no such chore")
            yield

        worker = EngineWorker(FakeEngine(FakeTokenizer()), 8, chores=chores())
        worker.start()
        try:
            generation = worker.submit([Submission([1, 104], SamplingParams(max_tokens=3))], new_stats())
            assert len((await generation.outputs())[0].token_ids) == 3
            while "no such chore" not in caplog.text:
                await asyncio.sleep(0.001)
            assert worker.healthy
        finally:
            worker.stop()

    asyncio.run(scenario())


def test_a_chore_that_hangs_ends_requests_as_a_step_does() -> None:
    async def scenario() -> None:
        go_on = threading.Event()

        def chores() -> Iterator[None]:
            go_on.wait(30)
            yield

        worker = EngineWorker(FakeEngine(FakeTokenizer()), 8, patience=0.02, chores=chores())
        worker.start()
        try:
            generation = worker.submit([Submission([1, 104], SamplingParams(max_tokens=3))], new_stats())
            with pytest.raises(Unavailable, match="the engine hangs"):
                await generation.accepted()
            assert not worker.healthy
            go_on.set()
            while not worker.healthy:
                await asyncio.sleep(0.01)
        finally:
            go_on.set()
            worker.stop()

    asyncio.run(scenario())


class SlowToTake(FakeEngine):
    """An engine that takes longer over a prompt than a worker spends on prompts between two steps."""

    def __init__(self) -> None:
        super().__init__(FakeTokenizer())
        self.events: list[str] = []
        self.refused: list[int] = []

    def add_request(
        self, request_id: str, prompt: str | list[int], params: SamplingParams, **options: Any
    ) -> list[int]:
        time.sleep(2 * ADMISSION_SECONDS)
        if prompt == self.refused:
            raise RequestError("no such prompt", param="prompt")
        self.events.append(request_id)
        return super().add_request(request_id, prompt, params, **options)

    def step(self) -> list[Delta]:
        self.events.append("step")
        return super().step()


@pytest.mark.parametrize(("prompts", "n"), [(12, 1), (5, 8)])
def test_a_request_with_many_prompts_is_taken_in_between_steps(prompts: int, n: int) -> None:
    """A stream that runs gets a step after every few prompts, and a request that comes later its turn."""

    async def scenario() -> None:
        engine = SlowToTake()
        worker = EngineWorker(engine, 1000)
        worker.start()
        try:
            stream = worker.submit([Submission([1, 104], SamplingParams(max_tokens=90))], new_stats())
            await stream.accepted()
            many = worker.submit([Submission([1, 104], SamplingParams(max_tokens=3, n=n))] * prompts, new_stats())
            late = worker.submit([Submission([1, 104], SamplingParams(max_tokens=3))], new_stats())
            await late.accepted()
            assert [output.token_ids for output in await late.outputs()] == [[97, 98, 99]]
            await many.accepted()
            outputs = await many.outputs()
            assert [len(output.completions) for output in outputs] == [n] * prompts
            stream.abort()
        finally:
            worker.stop()
        ids = [event for event in engine.events if event != "step"]
        assert ids.index(late.request_ids[0]) <= 3
        first, last = engine.events.index(many.request_ids[0]), engine.events.index(many.request_ids[-1])
        assert engine.events[first:last].count("step") >= prompts - 1

    asyncio.run(scenario())


@pytest.mark.parametrize("refused", [0, 4])
def test_a_refused_prompt_takes_those_before_it_along(refused: int) -> None:
    async def scenario() -> None:
        engine = SlowToTake()
        engine.refused = [9]
        worker = EngineWorker(engine, 1000)
        worker.start()
        try:
            submissions = [Submission([1, 104], SamplingParams(max_tokens=90))] * 6
            submissions[refused] = Submission([9], SamplingParams())
            generation = worker.submit(submissions, new_stats())
            with pytest.raises(RequestError, match="no such prompt"):
                await generation.accepted()
            assert (worker.unfinished, worker.requests, engine.running) == (0, 0, {})
            other = worker.submit([Submission([1], SamplingParams(max_tokens=2))], new_stats())
            assert len((await other.outputs())[0].token_ids) == 2
            assert len([event for event in engine.events if event != "step"]) == refused + 1
        finally:
            worker.stop()

    asyncio.run(scenario())


def test_an_abort_ends_the_taking_in() -> None:
    async def scenario() -> None:
        engine = SlowToTake()
        worker = EngineWorker(engine, 1000)
        worker.start()
        try:
            submission = Submission([1, 104], SamplingParams(max_tokens=90))
            generation = worker.submit([submission] * 100, new_stats())
            while not engine.running:
                await asyncio.sleep(0.001)
            generation.abort()
            await worker.call(lambda _: None)
            assert engine.running == {}
            await asyncio.sleep(5 * ADMISSION_SECONDS)
            assert engine.running == {}
        finally:
            worker.stop()

    asyncio.run(scenario())


@pytest.mark.parametrize(("prompts", "n"), [(9, 1), (3, 3), (1, 9)])
def test_the_bound_counts_sequences(prompts: int, n: int) -> None:
    """Ten places: nine sequences leave one, whatever prompts they are of; each that ends gives back its own."""

    async def scenario() -> None:
        engine = FakeEngine(FakeTokenizer())
        engine.gate.clear()
        worker = EngineWorker(engine, 10)
        worker.start()
        try:
            submission = Submission([1, 104], SamplingParams(max_tokens=2, n=n))
            generation = worker.submit([submission] * prompts, new_stats())
            await generation.accepted()
            two = [Submission([1, 104], SamplingParams(max_tokens=2, n=2))]
            with pytest.raises(QueueFull, match="9 sequences run or wait and 2 more came; at most 10 are taken"):
                worker.submit(two, new_stats())
            assert worker.unfinished == 9
            engine.gate.set()
            await generation.outputs()
            assert worker.unfinished == 0
            assert len((await worker.submit(two, new_stats()).outputs())[0].completions) == 2
        finally:
            worker.stop()

    asyncio.run(scenario())


def test_deadlines_count_from_the_arrival_of_the_http_request() -> None:
    """The engine is told when the request came, whatever tokenizing and queueing took since."""

    async def scenario() -> None:
        engine = FakeEngine(FakeTokenizer())
        worker = EngineWorker(engine, 8)
        worker.start()
        try:
            stats = new_stats()
            await asyncio.sleep(0.05)
            generation = worker.submit([Submission([1, 104], SamplingParams(max_tokens=2))] * 2, stats)
            await generation.outputs()
            assert engine.arrivals == [stats.arrived] * 2
        finally:
            worker.stop()

    asyncio.run(scenario())
