"""Deadlines: in the body, in headers, and what happens when they cannot be kept."""

from typing import Any

import httpx
import pytest

from emoe_jax.errors import SloUnattainable
from emoe_jax.requests.request import SLO
from tests.serve.conftest import StartServer
from tests.serve.events import events_of
from tests.serve.fake import FakeEngine, FakeTokenizer

CHAT = "/v1/chat/completions"
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "hi", "max_tokens": 2},
    CHAT: {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2},
}


@pytest.mark.parametrize("path", list(BODIES))
@pytest.mark.parametrize(
    ("headers", "body", "expected"),
    [
        ({}, None, SLO()),
        ({"x-slo-ttft-ms": "200", "x-slo-latency-ms": "1500.5"}, None, SLO(200, 1500.5)),
        ({"X-SLO-TTFT-MS": "200"}, {"latency_ms": 900}, SLO(200, 900)),
        ({"x-slo-ttft-ms": "200"}, {"ttft_ms": 50, "strict": True}, SLO(50, None, strict=True)),
    ],
)
def test_headers_and_body(
    start_server: StartServer, path: str, headers: dict[str, str], body: dict[str, Any] | None, expected: SLO
) -> None:
    engine = FakeEngine(FakeTokenizer())
    with start_server(engine) as client:
        answer = client.post(path, json={**BODIES[path], "emoe": {"slo": body}}, headers=headers)
    assert answer.status_code == 200, answer.text
    assert engine.requests[0]["slo"] == expected


@pytest.mark.parametrize("path", list(BODIES))
@pytest.mark.parametrize("name", ["x-slo-ttft-ms", "x-slo-latency-ms"])
@pytest.mark.parametrize("value", ["", "fast", "0", "-5", "nan", "inf", "1e300", "1, 2", "9" * 400])
def test_bad_headers_are_named(client: httpx.Client, path: str, name: str, value: str) -> None:
    answer = client.post(path, json={**BODIES[path], "emoe": {"slo": {"ttft_ms": 5}}}, headers={name: value})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == name
    assert error["message"].startswith(f"{name} is ")
    assert len(error["message"]) < 200


def test_headers_are_documented(client: httpx.Client) -> None:
    parameters = client.get("/openapi.json").json()["paths"][CHAT]["post"]["parameters"]
    assert {(item["name"], item["in"]) for item in parameters} == {
        ("x-slo-ttft-ms", "header"),
        ("x-slo-latency-ms", "header"),
        ("x-emoe-task", "header"),
    }


@pytest.mark.parametrize("path", list(BODIES))
@pytest.mark.parametrize(("body", "expected"), [({}, "qa"), ({"task": "sum"}, "sum"), ({"task": None}, "qa")])
def test_the_task_as_a_header_and_what_the_body_says_wins(
    start_server: StartServer, path: str, body: dict[str, Any], expected: str
) -> None:
    engine = FakeEngine(FakeTokenizer())
    with start_server(engine, tasks=("qa", "sum")) as client:
        answer = client.post(path, json={**BODIES[path], "emoe": body}, headers={"X-Emoe-Task": "qa"})
    assert answer.status_code == 200, answer.text
    assert engine.requests[0]["task"] == expected


@pytest.mark.parametrize("value", ["", "poetry", "t" * 65])
def test_a_bad_task_header_is_named(start_server: StartServer, value: str) -> None:
    with start_server(FakeEngine(FakeTokenizer()), tasks=("qa", "sum")) as client:
        answer = client.post(CHAT, json=BODIES[CHAT], headers={"x-emoe-task": value})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "x-emoe-task"


def test_deadlines_that_cannot_be_kept(start_server: StartServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise SloUnattainable("ttft_ms of 1 cannot be kept: the first token is expected after 20 ms")

    monkeypatch.setattr(FakeEngine, "add_request", refuse)
    with start_server(FakeEngine(FakeTokenizer())) as client:
        answer = client.post(CHAT, json={**BODIES[CHAT], "emoe": {"slo": {"ttft_ms": 1, "strict": True}}})
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "slo_unattainable"
    assert answer.json()["error"]["param"] == "emoe.slo"
    assert int(answer.headers["retry-after"]) >= 1


@pytest.mark.parametrize("path", list(BODIES))
def test_deadlines_given_up_are_told(client: httpx.Client, path: str) -> None:
    late = {**BODIES[path], "n": 2, "emoe": {"slo": {"ttft_ms": 0.5}}}
    assert client.post(path, json=late).json()["emoe"]["slo_unattainable"] is True
    assert "slo_unattainable" not in client.post(path, json=BODIES[path]).json()["emoe"]
    *others, last = events_of(client, path, **late, stream=True)
    assert last["emoe"]["slo_unattainable"] is True
    assert not any("emoe" in event for event in others)
