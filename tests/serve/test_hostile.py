"""What tries to harm: refused fast, without keeping memory, and others are served meanwhile."""

import contextlib
import gc
import json
import socket
import time
from typing import Any

import httpx
import pytest

from tests.serve.resident import TOLERANCE, needs_proc, resident_bytes

COMPLETIONS = "/v1/completions"
JSON = {"content-type": "application/json"}
HELLO = {"prompt": "hi", "max_tokens": 4}


def body(**fields: Any) -> bytes:
    return json.dumps({"prompt": "hi", **fields}).encode()


BODIES = {
    "a billion answers": body(n=10**9),
    "a million logprobs": body(logprobs=10**6),
    "negative length": body(max_tokens=-1),
    "length beyond 64 bits": body(max_tokens=2**63),
    "500k stop strings": body(stop=["x"] * 500_000),
    "a million biases": body(logit_bias={str(token): 1 for token in range(1_000_000)}),
    "NaN": body(temperature=float("nan")),
    "100k deep": b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "9 MiB": body(prompt="x" * (9 * 2**20)),
    "a control character": b'{"prompt": "\x00"}',
}


@pytest.mark.parametrize("name", list(BODIES))
def test_is_refused_within_100_ms(client: httpx.Client, name: str) -> None:
    """The best of several tries, as the machine may be busy with something else."""
    best = float("inf")
    for _ in range(20):
        began = time.perf_counter()
        answer = client.post(COMPLETIONS, content=BODIES[name], headers=JSON)
        best = min(best, time.perf_counter() - began)
        assert answer.status_code in (400, 413)
        if best < 0.1:
            break
    assert best < 0.1
    assert client.post(COMPLETIONS, json=HELLO).status_code == 200


@needs_proc
def test_what_is_refused_is_not_kept(client: httpx.Client) -> None:
    def refuse_all() -> None:
        for content in BODIES.values():
            assert client.post(COMPLETIONS, content=content, headers=JSON).status_code in (400, 413)
        gc.collect()

    for _ in range(3):
        refuse_all()
    before = resident_bytes()
    for _ in range(5):
        refuse_all()
    assert resident_bytes() - before < TOLERANCE


def test_slow_sockets_hold_up_nobody(client: httpx.Client) -> None:
    """A hundred that send half a header, and a hundred that send half a body; what ends them is in test_protocol.py."""
    address = ("127.0.0.1", client.base_url.port)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n"
    with contextlib.ExitStack() as stack:
        for index in range(200):
            slow = stack.enter_context(socket.create_connection(address, 5))
            slow.sendall(head if index % 2 else head + b'\r\n{"prompt": ')
        began = time.perf_counter()
        for _ in range(10):
            assert client.post(COMPLETIONS, json=HELLO).status_code == 200
        assert time.perf_counter() - began < 5
    assert client.get("/health").status_code == 200


def raw_status(client: httpx.Client, *headers: bytes, path: bytes = b"/health") -> int:
    """The status of an answer to a request with exactly these headers."""
    request = b"\r\n".join([b"GET " + path + b" HTTP/1.1", *headers, b"Connection: close", b"", b""])
    with socket.create_connection(("127.0.0.1", client.base_url.port), 5) as connection:
        connection.sendall(request)
        return int(connection.makefile("rb").readline().split()[1])


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([], 400),
        ([b"Host: a", b"Host: b"], 400),
        ([b"Host: a\x00b"], 400),
        ([b"Host: other.example"], 200),
        ([b"Host: \xff[a b"], 200),
    ],
)
def test_host_headers(client: httpx.Client, headers: list[bytes], status: int) -> None:
    """HTTP asks for one; what it says matters to nobody here, and no answer repeats it."""
    assert raw_status(client, *headers) == status
    assert raw_status(client, *(headers or [b"Host: x"]), path=b"/health/") == (status if headers else 200)
    assert client.get("/health").status_code == 200


def test_endless_headers(client: httpx.Client) -> None:
    with contextlib.suppress(ConnectionError):  # the server hangs up in the middle
        assert raw_status(client, b"Host: " + b"x" * 2_000_000) == 400
    assert client.get("/health").status_code == 200


@pytest.mark.parametrize(
    ("request_id", "status"), [(b"a\x1b[2J", 200), (b"a\tb", 200), (b"a\x7f", 200), (b"a\x00b", 400), (b"a\rb", 400)]
)
def test_control_characters_in_request_ids(client: httpx.Client, request_id: bytes, status: int) -> None:
    """Some are not HTTP; an id with others is replaced."""
    assert raw_status(client, b"Host: x", b"x-request-id: " + request_id) == status


@pytest.mark.parametrize("content", ["{{ 7 * 7 }}", "{% for x in range(10**9) %}x{% endfor %}", "{{ messages }}", "{#"])
def test_templates_in_messages_are_text(client: httpx.Client, content: str) -> None:
    messages = [{"role": "user", "content": content}]
    tokens = client.post("/tokenize", json={"messages": messages}).json()["tokens"]
    assert content in client.post("/detokenize", json={"tokens": tokens}).json()["prompt"]
