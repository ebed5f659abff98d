"""Connections that stall, and requests that are not HTTP: raw bytes on a socket."""

import contextlib
import gc
import logging
import socket
import time
from collections.abc import Iterator

import httpx
import pytest

from serve.errors import ErrorResponse
from serve.http.protocol import HttpConfig, HttpProtocol
from tests.serve.conftest import StartServer, running_server
from tests.serve.fake import FakeEngine, FakeTokenizer
from tests.serve.test_server import COMPLETIONS, ask, wait_until

TIMEOUT = 0.3
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n"
HALF_BODY = HEAD + b'\r\n{"prompt": '
ANSWERED = b"GET /health HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n"
"""Of a request that is answered without its body."""


@pytest.fixture(scope="module")
def hasty() -> Iterator[httpx.Client]:
    with running_server(FakeEngine(FakeTokenizer(), step_seconds=0.02), read_timeout=TIMEOUT) as client:
        yield client


@pytest.fixture(autouse=True)
def _no_failures(client: httpx.Client, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert ask(client).status_code == 200


def test_idle_connections_outlive_the_clients_patience() -> None:
    """Where the server closes first, a request may be on its way; httpx is what OpenAI's client goes by."""
    config = HttpConfig(None, read_timeout=1.0, send_timeout=1.0)
    assert config.timeout_keep_alive > 2 * (httpx.Limits().keepalive_expiry or 0)


def connected(client: httpx.Client) -> socket.socket:
    return socket.create_connection((client.base_url.host, client.base_url.port or 80), 5)


def all_of(connection: socket.socket) -> bytes:
    """What comes until the server hangs up."""
    received = b""
    with contextlib.suppress(ConnectionError):
        while data := connection.recv(2**16):
            received += data
    return received


def error_in(answer: bytes) -> str:
    return ErrorResponse.model_validate_json(answer.partition(b"\r\n\r\n")[2]).error.message


def test_a_thousand_slow_sockets(hasty: httpx.Client) -> None:
    """None of them lives for long, and they hold up nobody."""
    with contextlib.ExitStack() as stack:
        slow: list[socket.socket] = []
        for index in range(1000):
            slow.append(stack.enter_context(connected(hasty)))
            slow[-1].sendall((b"", HEAD, HALF_BODY, ANSWERED)[index % 4])
        for answered in slow[3::8]:
            answered.sendall(b"x")  # which ends uvicorn's own timeout where it has answered
        assert ask(hasty).status_code == 200
        answers = [all_of(connection) for connection in slow]
    assert set(answers[0::4]) == set(answers[1::4]) == {b""}
    for answer in answers[2::4]:
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert error_in(answer) == f"the request body did not come within {TIMEOUT} seconds"
    assert all(answer.startswith(b"HTTP/1.1 200 ") for answer in answers[3::4])


@pytest.mark.parametrize("start", [HEAD, HALF_BODY, ANSWERED])
def test_a_trickle_gets_no_more_time(hasty: httpx.Client, start: bytes) -> None:
    with connected(hasty) as slow:
        slow.sendall(start)
        began = time.monotonic()
        with pytest.raises(ConnectionError):  # noqa: PT012
            while time.monotonic() - began < 10:
                slow.sendall(b"x")
                time.sleep(0.02)
        assert time.monotonic() - began >= TIMEOUT


def test_answers_and_pauses_between_requests_may_take_longer(hasty: httpx.Client) -> None:
    body = b'{"prompt": "hi", "max_tokens": 50, "stream": true}'
    request = HEAD.replace(b"1000", str(len(body)).encode()) + b"\r\n" + body
    with connected(hasty) as connection:
        for _ in range(2):
            began = time.monotonic()
            connection.sendall(request)
            received = b""
            while not received.endswith(b"0\r\n\r\n"):
                received += connection.recv(2**16)
            assert b"[DONE]" in received
            assert time.monotonic() - began > 3 * TIMEOUT
            time.sleep(2 * TIMEOUT)


PAGES = 500
"""So many dashboards are more than the operating system keeps for a client."""


def asked_for_pages(client: httpx.Client, stack: contextlib.ExitStack) -> socket.socket:
    connection = stack.enter_context(connected(client))
    connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * (PAGES - 1))
    connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    return connection


def open_connections(client: httpx.Client) -> int:
    """Of one server, as it sees them."""
    found = [item for item in gc.get_objects() if type(item) is HttpProtocol]
    return sum(
        item.server == (client.base_url.host, client.base_url.port)
        and item.flow is not None
        and not item.transport.is_closing()
        for item in found
    )


def test_clients_that_stop_reading_are_cut(start_server: StartServer) -> None:
    with start_server(FakeEngine(FakeTokenizer()), send_timeout=TIMEOUT) as client, contextlib.ExitStack() as stack:
        lazy = [asked_for_pages(client, stack) for _ in range(4)]
        wait_until(lambda: open_connections(client) == len(lazy))
        wait_until(lambda: open_connections(client) == 0, 20)
        assert ask(client).status_code == 200
        for connection in lazy:
            assert 0 < all_of(connection).count(b"HTTP/1.1 200 ") < PAGES


def test_a_client_that_reads_slowly_gets_everything(start_server: StartServer) -> None:
    with start_server(FakeEngine(FakeTokenizer()), send_timeout=1.0) as client, contextlib.ExitStack() as stack:
        slow, count, began = asked_for_pages(client, stack), 0, time.monotonic()
        while data := slow.recv(2**18):
            count += data.count(b"HTTP/1.1 200 ")
            time.sleep(0.05)
        assert time.monotonic() - began > 1
        assert count > 0.9 * PAGES  # some status lines are cut in two by reading


CHUNKED = HEAD.replace(b"Content-Length: 1000", b"Transfer-Encoding: chunked") + b"\r\n"


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET /health\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"a" * 500,
        b"\x1b[2J /health HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /%0d%0aFoo: bar HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\nx-request-id: a\r\n\x1b[2J\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\nx-request-id: " + b"x" * 2**20 + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        b"GET /health HTTP/1.1\r\nHost: x\r\nContent-Length: " + b"9" * 100 + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        CHUNKED + b"xyz\r\n",
        CHUNKED + b"F" * 40 + b"\r\n",
        CHUNKED + b"1;" + b"x" * 100_000,
    ],
    ids=lambda content: repr(content[-30:]),
)
def test_what_is_not_http_is_refused_in_our_shape(client: httpx.Client, request_bytes: bytes) -> None:
    with connected(client) as connection:
        began = time.perf_counter()
        with contextlib.suppress(ConnectionError):  # the server hangs up in the middle
            connection.sendall(request_bytes)
        answer = all_of(connection)
        assert time.perf_counter() - began < 5
    assert not answer or answer.startswith(b"HTTP/1.1 400 ")
    if answer:
        assert error_in(answer) == "the request is not valid HTTP/1.1"
        assert b"\x1b" not in answer


@pytest.mark.parametrize("start", [CHUNKED, CHUNKED.replace(b"POST /v1/completions", b"GET /health")])
@pytest.mark.parametrize("pause", [0.0, 0.1])
def test_chunks_without_a_size(client: httpx.Client, start: bytes, pause: float) -> None:
    """Before the answer, with it, and after it."""
    with connected(client) as connection:
        connection.sendall(start)
        time.sleep(pause)
        connection.sendall(b"xyz\r\n")
        assert all_of(connection).count(b"HTTP/1.1 ") <= 1


def test_garbage_during_an_answer_ends_it(start_server: StartServer) -> None:
    engine = FakeEngine(FakeTokenizer(), step_seconds=0.02)
    body = b'{"prompt": "hi", "max_tokens": 90, "stream": true}'
    with start_server(engine) as client, connected(client) as connection:
        connection.sendall(CHUNKED + b"%x\r\n%s\r\n" % (len(body), body))
        connection.sendall(b"0\r\n\r\n")
        assert b"200" in connection.recv(100)
        connection.sendall(b"\x00\r\n\r\n")
        all_of(connection)
        wait_until(lambda: not engine.running)


METHODS = ("HEAD", "OPTIONS", "PUT", "DELETE", "PATCH", "TRACE", "CONNECT", "BREW")
PATHS = ("/", "/health", "/metrics", "/v1/models", "/v1/models/x", COMPLETIONS, "/v1/chat/completions", "/tokenize",
         "/detokenize", "/v1/emoe/state", "/docs", "/openapi.json", "*", "http://elsewhere/")  # fmt: skip
UPGRADE = (
    b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)


@pytest.mark.parametrize("extra", [b"", UPGRADE], ids=["", "websocket"])
def test_every_method_on_every_path(client: httpx.Client, caplog: pytest.LogCaptureFixture, extra: bytes) -> None:
    statuses: set[int] = set()
    for method in (*METHODS, *["GET"] * bool(extra)):
        for path in PATHS:
            with connected(client) as connection:
                head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
                connection.sendall(head.encode() + extra + b"\r\n")
                statuses.add(int(all_of(connection).split()[1]))
    assert statuses <= {200, 404, 405}
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_old_and_pipelined_requests(client: httpx.Client) -> None:
    with connected(client) as connection:
        connection.sendall(b"GET /health HTTP/1.0\r\n\r\n")
        assert all_of(connection).startswith(b"HTTP/1.1 200 ")
    with connected(client) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" * 200)
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert all_of(connection).count(b"HTTP/1.1 200 ") == 201


def test_a_body_longer_than_it_says(client: httpx.Client) -> None:
    """The rest is another request, and none."""
    with connected(client) as connection:
        connection.sendall(HEAD.replace(b"1000", b"2") + b'\r\n{}"prompt": "hi"}\r\n\r\n')
        answer = all_of(connection)
    assert answer.count(b"HTTP/1.1 400 ") == 2
    assert b"prompt is missing" in answer
