"""A step that hangs: who is told, what becomes of its requests, and that work goes on when it is over."""

import dataclasses
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from emoe_jax.engine.vitals import StepTimes, Vitals
from serve.interrupt import LEFT_BEHIND
from serve.watchdog import Watchdog
from tests.serve.conftest import running_server
from tests.serve.fake import FakeEngine, FakeTokenizer
from tests.serve.process import ServerProcess

PATIENCE = 0.2
COMPLETIONS = "/v1/completions"


class Scene:
    """A watchdog with 30 seconds of patience, a clock, and a step that began at 0."""

    def __init__(self, longest: float | None = 2.0):
        self.vitals = Vitals(longest, (0,), compiling=False)
        self.now = 0.0
        self.watchdog = Watchdog(lambda: self.vitals, 30, lambda: self.now)
        assert self.watchdog.look(0.0) is None

    def at(self, now: float, **changes: object) -> str | None:
        self.now = now
        self.vitals = dataclasses.replace(self.vitals, **changes)  # pyright: ignore[reportArgumentType]
        return self.watchdog.look(0.0)


def test_a_step_hangs_after_ten_times_the_longest_and_patience() -> None:
    scene = Scene()
    assert scene.at(50) is None
    found = scene.at(51)
    assert found == "the engine hangs: a step that usually takes 2 s at most has made no progress for 51 s"


def test_the_first_step_gets_ten_times_the_patience() -> None:
    scene = Scene(None)
    assert scene.at(300) is None
    assert "the first step has made no progress for 301 s" in (scene.at(301) or "")


@pytest.mark.parametrize("change", [{"progress": (1,)}, {"compiling": True}])
def test_a_sign_of_life_starts_the_clock_anew(change: dict[str, object]) -> None:
    scene = Scene()
    assert scene.at(45, **change) is None
    assert scene.at(90, compiling=False) is None
    assert scene.at(96) is not None


def test_another_step_starts_the_clock_anew() -> None:
    scene = Scene()
    scene.now = 60
    assert scene.watchdog.look(59.0) is None
    assert scene.watchdog.look(None) is None


def test_without_patience_nothing_hangs() -> None:
    assert Watchdog(lambda: Vitals(0.0, (), compiling=False), 0, lambda: 1e6).look(0.0) is None


def test_the_longest_step_is_forgotten_after_a_while() -> None:
    times = StepTimes()
    assert times.longest is None
    for _ in range(70):
        times.took(8.0)
    assert times.longest == 8.0
    for _ in range(70):
        times.took(1.0)
    assert 3.5 < (times.longest or 0) < 4.0


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(FakeTokenizer())


@pytest.fixture
def client(engine: FakeEngine) -> Iterator[httpx.Client]:
    with running_server(engine, patience=PATIENCE) as client:
        yield client
        engine.released.set()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("stream", [False, True])
def test_requests_of_a_hanging_step_end_and_others_come_after_it(
    client: httpx.Client, engine: FakeEngine, stream: bool
) -> None:
    engine.released.clear()
    request = {"prompt": "hi", "max_tokens": 4, "stream": stream}
    try:
        answer = client.post(COMPLETIONS, json=request, timeout=5)
    except httpx.ReadTimeout:
        pytest.fail("the request waits with the step")
    assert "the engine hangs" in answer.text
    assert stream or (answer.status_code == 503 and "retry-after" in answer.headers)

    for path in ("/health", "/ready"):
        found = client.get(path)
        assert found.status_code == 503
        assert "the engine hangs" in found.json()["error"]["message"]
    refused = client.post(COMPLETIONS, json={"prompt": "hi", "max_tokens": 4})
    assert refused.status_code == 503
    assert client.get("/v1/emoe/state").status_code == 503
    assert client.get("/metrics").status_code == 200

    engine.released.set()
    wait_until(lambda: client.get("/health").status_code == 200)
    assert not engine.running  # what has ended is not computed
    answer = client.post(COMPLETIONS, json={"prompt": "hi", "max_tokens": 4})
    assert answer.json()["choices"][0]["text"] == "abcd"


def test_waiting_for_loads_is_no_hang(client: httpx.Client, engine: FakeEngine) -> None:
    engine.released.clear()
    answers: list[httpx.Response] = []
    request = {"prompt": "hi", "max_tokens": 4}
    thread = threading.Thread(target=lambda: answers.append(client.post(COMPLETIONS, json=request)))
    thread.start()
    for count in range(30):  # three times the patience
        engine.vitals = Vitals(0.0, (count,), compiling=False)
        time.sleep(PATIENCE / 10)
        assert client.get("/health").status_code == 200
    engine.released.set()
    thread.join()
    assert answers[0].status_code == 200


def test_a_server_whose_step_hangs_can_be_ended(tiny: Path) -> None:
    """Without its last step, which never ends, and within seconds."""
    arguments = ("--model", str(tiny), "--max-num-seqs", "1", "--shutdown-timeout", "0")
    arguments += ("--max-num-batched-tokens", "16")  # few steps to compile
    server = ServerProcess(arguments, module="tests.serve.hanging")
    try:
        server.wait_until_ready(300)
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(httpx.post, f"{server.url}{COMPLETIONS}", json={"prompt": "hello"}, timeout=60)
            server.wait_for("the step hangs", 60)
            server.process.send_signal(signal.SIGTERM)
            assert answer.result().status_code == 503
        assert server.wait(10) == LEFT_BEHIND
        assert "a step does not end" in server.output[-1]
    finally:
        server.close()
