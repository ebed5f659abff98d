"""What the log says of requests, and what it must not say."""

import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from serve.telemetry.logs import JsonFormatter, TextFormatter
from tests.serve.conftest import StartServer
from tests.serve.events import events_of
from tests.serve.fake import FakeEngine, FakeTokenizer
from tests.serve.test_server import ask, wait_until


@pytest.fixture(params=[TextFormatter, JsonFormatter])
def stream(request: pytest.FixtureRequest) -> Iterator[io.StringIO]:
    """What a handler of the server's log writes."""
    stream, logger = io.StringIO(), logging.getLogger("serve")
    handler = logging.StreamHandler(stream)
    handler.setFormatter(request.param())
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield stream
    logger.removeHandler(handler)
    logger.setLevel(level)


def fields_of(line: str) -> dict[str, Any]:
    """The fields of a line in either format, numbers as numbers."""
    if line.startswith("{"):
        return json.loads(line)
    words = line.partition(" serve.requests: request ")[2].split(" ")
    pairs = (word.split("=", 1) for word in words)
    return {name: float(value) if value.replace(".", "").isdigit() else value for name, value in pairs}


def test_a_line_for_each_request_and_nothing_of_its_content(start_server: StartServer, stream: io.StringIO) -> None:
    with start_server(FakeEngine(FakeTokenizer(), step_seconds=0.005)) as client:
        ask(client, prompt="secret words", max_tokens=5)
        events_of(client, "/v1/completions", prompt="secret words", stop="c", n=2, stream=True)
        client.post("/v1/completions", json={"prompt": "secret words", "max_tokens": -1})
        client.post("/tokenize", json={"prompt": "secret words"}, headers={"x-request-id": "mine-1"})
        client.get("/secret%0Awords")
        client.get("/health")
    assert "secret" not in stream.getvalue()
    whole, streamed, refused, tokenized, unknown = map(fields_of, stream.getvalue().splitlines())
    assert (whole["status"], whole["route"], whole["method"]) == (200, "/v1/completions", "POST")
    assert (whole["prompt_tokens"], whole["completion_tokens"], whole["finish_reason"]) == (13, 5, "length")
    assert (whole["task"], whole["routing"], whole["substituted"]) == ("conv", "resident", 0.25)
    assert whole["latency_ms"] > whole["ttft_ms"] >= 5
    assert (streamed["completion_tokens"], streamed["finish_reason"]) == (6, "stop")
    assert (refused["status"], "finish_reason" in refused) == (400, False)
    assert (tokenized["request_id"], tokenized["route"]) == ("mine-1", "/tokenize")
    assert unknown["status"] == 404
    assert len({line["request_id"] for line in (whole, streamed, refused, tokenized, unknown)}) == 5


def test_what_ends_early_says_so(start_server: StartServer, stream: io.StringIO) -> None:
    engine = FakeEngine(FakeTokenizer(), step_seconds=0.1)
    with start_server(engine) as client:
        with client.stream("POST", "/v1/completions", json={"prompt": "hi", "stream": True, "max_tokens": 90}) as cut:
            next(cut.iter_lines())
        wait_until(lambda: "abort" in stream.getvalue())
    line = fields_of(stream.getvalue().splitlines()[0])
    assert (line["status"], line["finish_reason"]) == (200, "abort")
    assert line["completion_tokens"] >= 1


def test_a_task_cannot_forge_lines(start_server: StartServer, stream: io.StringIO) -> None:
    with start_server(FakeEngine(FakeTokenizer())) as client:
        ask(client, emoe={"task": 'x\n2026-01-01 INFO serve.requests: request task="y"\x1b[2J'})
    (line,) = stream.getvalue().splitlines()
    assert "\x1b" not in line
    assert "\\n2026" in line


def test_refused_keys_are_logged_without_them(start_server: StartServer, stream: io.StringIO) -> None:
    with start_server(FakeEngine(FakeTokenizer()), api_keys=["right"]) as client:
        client.get("/v1/models", headers={"authorization": "Bearer wrong"})
    (line,) = stream.getvalue().splitlines()
    assert fields_of(line)["status"] == 401
    assert "wrong" not in line


def test_a_failure_of_ours_is_logged_and_answered_under_its_id(
    start_server: StartServer, stream: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: FakeEngine) -> None:
        raise ValueError("inner matters")

    monkeypatch.setattr(FakeEngine, "state", fail)
    with start_server(FakeEngine(FakeTokenizer())) as client:
        answer = client.get("/v1/emoe/state", headers={"x-request-id": "mine-1"})
    assert (answer.status_code, answer.headers["x-request-id"]) == (500, "mine-1")
    assert answer.json()["error"]["message"] == "internal server error"
    lines = stream.getvalue().splitlines()
    assert "mine-1" in lines[0]
    assert "inner matters" in stream.getvalue()
    assert fields_of(lines[-1])["status"] == 500


def test_json_lines_hold_exceptions() -> None:
    try:
        raise RuntimeError("device\nlost")
    except RuntimeError as error:
        record = logging.LogRecord("serve", logging.ERROR, "", 0, "it %s", ("failed",), (type(error), error, None))
    (line,) = JsonFormatter().format(record).splitlines()
    entry = json.loads(line)
    assert (entry["level"], entry["message"]) == ("ERROR", "it failed")
    assert "device\nlost" in entry["exception"]


def test_quiet_without_a_log(client: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="serve"):
        ask(client)
    assert not caplog.records
