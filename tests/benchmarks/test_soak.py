"""The soak on a real server over a fake engine: what it counts, and what it calls an error."""

import asyncio
from collections.abc import Iterator

import httpx
import pytest

from benchmarks.serving.workload import Sample
from benchmarks.soak import KINDS, slope, soak
from serve.served_engine import ServedEngine
from tests.serve.conftest import running_server
from tests.serve.fake import FakeEngine, FakeTokenizer
from tests.serve.resident import needs_proc
from tests.serve.states import engine_state

SAMPLES = {"qa": [Sample(2, 2, ({"role": "user", "content": "hi"},))]}


class Engine(FakeEngine):
    def state(self) -> dict:
        return engine_state()


@pytest.fixture
def engine() -> ServedEngine:
    return Engine(FakeTokenizer(), step_seconds=0.001)


@pytest.fixture
def client(engine: FakeEngine) -> Iterator[httpx.Client]:
    with running_server(engine) as client:
        yield client


def run(client: httpx.Client, seconds: float = 4.0) -> dict:
    return asyncio.run(soak(str(client.base_url), SAMPLES, seconds / 60, users=4, seed=0))


@needs_proc
def test_a_sound_server_has_no_errors(client: httpx.Client) -> None:
    report = run(client)
    assert report["errors"] == 0, report["first_errors"]
    assert set(report["requests"]) == set(KINDS)
    assert report["compilations"] == 0
    assert report["rss_begin_mb"] > 10
    assert report["rss_slope_mb_per_min"] is not None
    assert report["pages_used_left"] == engine_state()["scheduler"]["pages_used"]


@needs_proc
def test_what_fails_is_reported(client: httpx.Client, engine: FakeEngine) -> None:
    engine.failures = [RuntimeError() for _ in range(5)]
    report = run(client, 2.0)
    assert report["errors"] > 0
    assert "failed" in " ".join(report["first_errors"])


def test_the_slope_is_that_of_the_later_part() -> None:
    times = [10.0 * index for index in range(61)]  # ten minutes
    memory = [100.0 + min(index, 20) + 0.05 * max(0, index - 20) for index in range(61)]
    assert slope(times, memory) == pytest.approx(0.3)
    assert slope([0.0, 1.0], [1.0, 2.0]) is None
