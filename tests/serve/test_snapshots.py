"""Many callers of the engine's state and of the metrics: few looks at the engine, and no old news."""

import asyncio
import math
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

import serve.telemetry.snapshots
from emoe_jax import SamplingParams
from serve.generation import Submission
from serve.telemetry.metrics import RequestMetrics
from serve.telemetry.snapshots import LEAST_PAUSE, REFRESH_SECONDS, Snapshots
from serve.telemetry.stats import RequestStats
from serve.worker import EngineWorker
from tests.serve.conftest import StartServer
from tests.serve.fake import FakeEngine, FakeTokenizer
from tests.serve.states import engine_state
from tests.serve.test_server import COMPLETIONS, ask, wait_until

STATE, METRICS = "/v1/emoe/state", "/metrics"


class CountingEngine(FakeEngine):
    """Its state says how often it was looked at."""

    looks = 0

    def state(self) -> dict[str, Any]:
        self.looks += 1
        return engine_state() | {"steps": self.looks}


@pytest.fixture
def expositions(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often metrics were written out."""
    counts: Counter[str] = Counter()
    written = serve.telemetry.snapshots.exposition

    def counted(families: Any) -> bytes:
        counts["written"] += 1
        return written(families)

    monkeypatch.setattr(serve.telemetry.snapshots, "exposition", counted)
    return counts


def most_looks(seconds: float, pause: float = REFRESH_SECONDS) -> int:
    return math.ceil(seconds / pause) + 2  # the running request comes and goes


@pytest.mark.parametrize("paths", [[STATE], [METRICS], [STATE, METRICS]])
@pytest.mark.parametrize("callers", [1, 16])
def test_looks_do_not_grow_with_callers(
    start_server: StartServer, expositions: Counter[str], paths: list[str], callers: int
) -> None:
    engine = CountingEngine(FakeTokenizer(), step_seconds=0.01)
    with start_server(engine) as client, ThreadPoolExecutor(callers + 1) as pool:
        running = pool.submit(ask, client, max_tokens=90)
        wait_until(lambda: bool(engine.running))
        began = time.monotonic()
        answers = list(pool.map(lambda number: client.get(paths[number % len(paths)]), range(200)))
        seconds = time.monotonic() - began
        assert {answer.status_code for answer in answers} == {200}
        assert engine.looks <= most_looks(seconds)
        assert expositions["written"] <= engine.looks * (METRICS in paths)
        assert running.result().status_code == 200


def test_looks_do_not_grow_with_requests_that_come_and_go(start_server: StartServer) -> None:
    engine = CountingEngine(FakeTokenizer())
    with start_server(engine) as client, ThreadPoolExecutor(8) as pool:
        began = time.monotonic()
        requests = [pool.submit(ask, client) for _ in range(100)]
        while not all(request.done() for request in requests):
            assert client.get(STATE).status_code == 200
        assert engine.looks <= most_looks(time.monotonic() - began, LEAST_PAUSE)


def test_costly_looks_are_as_rare_as_they_may_be(start_server: StartServer, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = CountingEngine(FakeTokenizer())
    look = engine.state

    def slow() -> dict[str, Any]:
        time.sleep(0.02)
        return look()

    monkeypatch.setattr(engine, "state", slow)
    with start_server(engine) as client:
        began = time.monotonic()
        while time.monotonic() - began < 1.5:
            assert ask(client).status_code == 200  # a change
            assert client.get(STATE).status_code == 200
        assert engine.looks <= most_looks(time.monotonic() - began)


@pytest.mark.parametrize("path", [STATE, METRICS])
def test_a_request_that_ended_shows_at_once(start_server: StartServer, path: str) -> None:
    """However short ago the last look was: by an answer, by an abort, by a failure."""
    engine = FakeEngine(FakeTokenizer(), step_seconds=0.01)

    def seen(client: httpx.Client) -> Any:
        if path == STATE:
            return client.get(path).json()["running"]
        lines = client.get(path).text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith("emoe:request_success_total"))

    with start_server(engine) as client:
        assert seen(client) == 0
        assert ask(client).status_code == 200
        assert seen(client) == (0 if path == STATE else 1)
        with client.stream("POST", COMPLETIONS, json={"prompt": "hi", "max_tokens": 90, "stream": True}) as response:
            lines = response.iter_lines()  # kept, as the connection ends with it
            next(lines)
            assert seen(client) == 1
        wait_until(lambda: not engine.running)
        assert seen(client) == (0 if path == STATE else 2)
        engine.failures = [RuntimeError()]
        assert ask(client).status_code == 500
        assert seen(client) == (0 if path == STATE else 3)


def test_an_idle_engine_s_state_gets_no_older_than_it_says(start_server: StartServer) -> None:
    """Experts are loaded in the background, too."""
    engine = CountingEngine(FakeTokenizer())
    with start_server(engine) as client:
        for look in range(1, 4):
            assert client.get(STATE).json()["steps"] == look
            time.sleep(REFRESH_SECONDS * 1.1)


def test_callers_wait_for_a_look_together_and_leave_alone() -> None:
    """One that leaves does not take the look away from the others."""

    async def scenario() -> None:
        engine = CountingEngine(FakeTokenizer())
        worker = EngineWorker(engine, 8)
        worker.start()
        try:
            metrics = RequestMetrics()
            snapshots = Snapshots(worker, metrics, "fake")
            first = await snapshots.state_json()
            assert first is await snapshots.state_json()
            generation = worker.submit([Submission([1], SamplingParams(max_tokens=2))], RequestStats(metrics))
            await generation.outputs()
            callers = [asyncio.create_task(snapshots.state_json()) for _ in range(100)]
            await asyncio.sleep(0)
            callers[0].cancel()
            results = await asyncio.gather(*callers, return_exceptions=True)
            assert isinstance(results[0], asyncio.CancelledError)
            assert len({id(result) for result in results[1:]}) == 1
            assert first is not results[1]
            assert engine.looks == 2
        finally:
            worker.stop()

    asyncio.run(scenario())


def test_numbers_that_json_lacks_are_null(start_server: StartServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeEngine, "state", lambda _: {"residency": {"coverage": float("nan")}})
    with start_server(FakeEngine(FakeTokenizer())) as client:
        assert client.get(STATE).json() == {"residency": {"coverage": None}}


def test_a_look_that_fails_is_not_kept(start_server: StartServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: FakeEngine) -> dict[str, Any]:
        raise KeyError("x")

    with start_server(FakeEngine(FakeTokenizer())) as client:
        with monkeypatch.context() as patch:
            patch.setattr(FakeEngine, "state", broken)
            assert client.get(STATE).status_code == 500
        assert client.get(STATE).status_code == 200
