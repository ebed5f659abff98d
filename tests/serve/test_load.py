"""Clients that leave by the thousand, and many more requests than may wait."""

import asyncio
import gc
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx

from serve.generation import Generation
from tests.serve.conftest import StartServer
from tests.serve.fake import FakeEngine, FakeTokenizer
from tests.serve.resident import TOLERANCE, needs_proc, resident_bytes
from tests.serve.test_server import COMPLETIONS, ask, wait_until

CANCELLED = 1000
STREAM = b'{"prompt": "hi", "max_tokens": 90, "stream": true}'


def cut_stream(port: int, body: bytes = STREAM, *headers: str) -> None:
    """Ask for a stream and leave after its first bytes."""
    first = (f"POST {COMPLETIONS} HTTP/1.1", "Host: localhost", "Content-Type: application/json")
    lines = [*first, f"Content-Length: {len(body)}", *headers, "", ""]
    with socket.create_connection(("127.0.0.1", port), 60) as connection:
        connection.sendall("\r\n".join(lines).encode() + body)
        assert connection.recv(100).startswith(b"HTTP/1.1 200")


def alive(kind: type) -> int:
    """How many objects of a kind there are."""
    gc.collect()
    return sum(type(found) is kind for found in gc.get_objects())


@needs_proc
def test_a_thousand_cancelled_streams_leave_nothing(start_server: StartServer) -> None:
    before = alive(Generation)  # an engine that died in another test may still hold the one it died with
    engine = FakeEngine(FakeTokenizer(), step_seconds=0.002)
    with start_server(engine) as client, ThreadPoolExecutor(8) as pool:
        port = client.base_url.port
        assert port is not None

        def cut(count: int) -> tuple[int, int, int, int]:
            list(pool.map(lambda _: cut_stream(port), range(count)))
            wait_until(lambda: not engine.running)
            engine.requests.clear()
            wait_until(lambda: alive(Generation) <= before)
            return alive(Generation), alive(asyncio.Task), threading.active_count(), resident_bytes()

        generations, tasks, threads, memory = cut(200)
        after = cut(CANCELLED)
        assert after[0] <= before
        assert generations <= before
        assert after[1] <= tasks
        assert after[2] <= threads
        assert abs(after[3] - memory) < TOLERANCE
        assert ask(client).json()["choices"][0]["text"] == "abcd"


def test_ten_times_more_than_may_wait(start_server: StartServer) -> None:
    """Who is refused learns it while the others are still waiting; who was accepted gets a whole answer."""
    places = 8
    engine = FakeEngine(FakeTokenizer())
    engine.gate.clear()
    with start_server(engine, max_unfinished=places) as client, ThreadPoolExecutor(10 * places) as pool:
        refused: list[float] = []

        def request(_: int) -> httpx.Response:
            began = time.perf_counter()
            answer = ask(client)
            if answer.status_code == 503:
                refused.append(time.perf_counter() - began)
            return answer

        answers = [pool.submit(request, index) for index in range(10 * places)]
        wait_until(lambda: len(refused) == 9 * places)
        assert len(engine.running) == places
        assert not [future for future in answers if future.done() and future.result().status_code == 200]
        engine.gate.set()
        results = [future.result() for future in answers]
        accepted = [answer for answer in results if answer.status_code == 200]
        assert len(accepted) == places
        assert all(answer.json()["choices"][0]["text"] == "abcd" for answer in accepted)
        for answer in results:
            if answer.status_code != 200:
                assert int(answer.headers["retry-after"]) >= 1
                assert answer.json()["error"]["code"] == "queue_full"
        began = time.perf_counter()
        assert ask(client).status_code == 200
        assert time.perf_counter() - began < 5
