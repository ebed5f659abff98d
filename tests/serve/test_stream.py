"""What keeps a silent stream open, and what an event's text may hold."""

import json
import threading
import time

import httpx
import openai
import pytest

from serve.options import KEEP_ALIVE_SECONDS
from serve.stream import sse
from tests.serve.conftest import StartServer
from tests.serve.fake import FakeEngine, FakeTokenizer
from tests.serve.test_server import COMPLETIONS, ask, wait_until

CHAT = "/v1/chat/completions"
COMMENT = ": keep-alive"
BODIES = {
    COMPLETIONS: {"prompt": "hi", "max_tokens": 4, "stream": True},
    CHAT: {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4, "stream": True},
}


def test_no_proxy_s_patience_is_exceeded() -> None:
    assert KEEP_ALIVE_SECONDS < 30


@pytest.mark.parametrize("path", list(BODIES))
def test_a_stream_that_waits_sends_comments_before_its_first_token(start_server: StartServer, path: str) -> None:
    engine = FakeEngine(FakeTokenizer())
    engine.gate.clear()
    with start_server(engine, keep_alive=0.05) as client, client.stream("POST", path, json=BODIES[path]) as response:
        assert (response.status_code, response.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
        lines = response.iter_lines()
        waiting = [next(lines) for _ in range(6)]
        assert waiting == [COMMENT, ""] * 3
        engine.gate.set()
        rest = [line for line in lines if line and line != COMMENT]
    assert rest[-1] == "data: [DONE]"
    assert all(line.startswith("data: ") for line in rest)


def test_a_stream_that_is_slow_sends_comments_between_tokens(start_server: StartServer) -> None:
    with start_server(FakeEngine(FakeTokenizer(), step_seconds=0.3), keep_alive=0.05) as client:
        with client.stream("POST", COMPLETIONS, json=BODIES[COMPLETIONS]) as response:
            lines = [line for line in response.iter_lines() if line]
        first = next(number for number, line in enumerate(lines) if line.startswith("data: "))
        assert lines[first:-1].count(COMMENT) >= 3
        assert lines[-1] == "data: [DONE]"


def test_tokens_without_text_are_silence_too(start_server: StartServer) -> None:
    """They are held back while they may become a stop string."""
    body = {"prompt": "hi", "max_tokens": 20, "stream": True, "stop": "abcdefghijklmnopqrstuvw"}
    with (
        start_server(FakeEngine(FakeTokenizer(), step_seconds=0.05), keep_alive=0.2) as client,
        client.stream("POST", COMPLETIONS, json=body) as response,
    ):
        lines = [line for line in response.iter_lines() if line]
    assert lines.count(COMMENT) >= 2
    assert lines.index(COMMENT) < len(lines) - 2


def test_a_stream_that_flows_has_no_comments(start_server: StartServer) -> None:
    with (
        start_server(FakeEngine(FakeTokenizer()), keep_alive=5.0) as client,
        client.stream("POST", COMPLETIONS, json=BODIES[COMPLETIONS]) as response,
    ):
        assert COMMENT not in list(response.iter_lines())


def test_what_is_refused_keeps_its_status(start_server: StartServer) -> None:
    engine = FakeEngine(FakeTokenizer())
    engine.gate.clear()
    with start_server(engine, keep_alive=0.01, max_unfinished=1, api_keys=["secret"]) as client:
        client.headers["authorization"] = "Bearer secret"
        with client.stream("POST", COMPLETIONS, json=BODIES[COMPLETIONS]) as response:
            assert response.status_code == 200
            wait_until(lambda: bool(engine.requests))
            full = ask(client, stream=True)
            assert (full.status_code, full.json()["error"]["code"]) == (503, "queue_full")
            assert client.post(COMPLETIONS, json=BODIES[COMPLETIONS], headers={"authorization": "x"}).status_code == 401
        wait_until(lambda: not engine.running)
        assert ask(client, stream=True, prompt="x" * 99).status_code == 400  # longer than the context
        assert ask(client, stream=True, prompt=[128]).status_code == 400  # which only the engine finds out


def test_what_fails_after_comments_is_an_event(start_server: StartServer) -> None:
    engine = FakeEngine(FakeTokenizer())
    engine.gate.clear()
    with start_server(engine, keep_alive=0.05) as client:
        with client.stream("POST", COMPLETIONS, json=BODIES[COMPLETIONS]) as response:
            lines = response.iter_lines()
            assert next(lines) == COMMENT
            engine.failures = [RuntimeError()]
            engine.gate.set()
            events = [line for line in lines if line.startswith("data: ")]
        assert json.loads(events[0].removeprefix("data: "))["error"]["code"] == "internal_error"
        assert events[1:] == ["data: [DONE]"]
        assert ask(client).status_code == 200


def test_a_client_that_leaves_a_waiting_stream_frees_the_engine(start_server: StartServer) -> None:
    engine = FakeEngine(FakeTokenizer())
    engine.gate.clear()
    with start_server(engine, keep_alive=0.05) as client:
        with client.stream("POST", COMPLETIONS, json=BODIES[COMPLETIONS]) as response:
            assert next(iter(response.iter_lines())) == COMMENT
        wait_until(lambda: not engine.running)


def test_openai_s_client_skips_comments(start_server: StartServer) -> None:
    engine = FakeEngine(FakeTokenizer())
    engine.gate.clear()
    with start_server(engine, keep_alive=0.05) as client:
        threading.Timer(0.3, engine.gate.set).start()
        began = time.monotonic()
        with openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0) as user:
            stream = user.chat.completions.create(
                model="", messages=[{"role": "user", "content": "hello"}], max_tokens=4, stream=True
            )
            text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        assert time.monotonic() - began > 0.2
    assert text == "abcd"


LINE_ENDS = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\x1dh\x1ei\r\nj\rk\u200bl\u00e9\U0001f600"


def test_an_event_is_one_line_to_every_reader() -> None:
    event = sse(json.dumps({"text": LINE_ENDS}, ensure_ascii=False))
    assert event.decode().splitlines() == [event.decode().removesuffix("\n\n"), ""]
    assert json.loads(event.removeprefix(b"data: ")) == {"text": LINE_ENDS}
    assert "\u00e9\U0001f600".encode() in event  # other characters stay as they are


@pytest.mark.parametrize("text", [LINE_ENDS, "\u2028", "\x85\x85", "plain"])
def test_texts_come_through_streams_as_they_are(client: httpx.Client, text: str) -> None:
    body = {"prompt": text, "echo": True, "max_tokens": 1, "stream": True}
    with client.stream("POST", COMPLETIONS, json=body) as response:
        content = b"".join(response.iter_bytes()).decode()
    lines = [line for line in content.splitlines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert json.loads(lines[0].removeprefix("data: "))["choices"][0]["text"] == text + "a"
