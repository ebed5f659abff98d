"""Replicas under Ray Serve, without a cluster: what gateway, router and replica do with each request."""

import asyncio
import dataclasses
import json
import warnings
from collections.abc import AsyncIterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.requests import Request
from starlette.types import Message

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray's own, while it is imported
    pytest.importorskip("ray.serve", reason="needs the ray extra")

from ray.exceptions import ActorDiedError  # pyright: ignore[reportMissingImports]

from serve import ray_app
from serve.replicas.call import ANSWERS, ATTAINED, FLEET, GOAL, Call
from serve.replicas.gateway import Forwarder, call_of, task_of
from serve.replicas.router import ReplicaRouter, queue_and_deadlines
from tests.serve.fake import FakeEngine, FakeTokenizer
from tests.serve.fleet import local_server
from tests.serve.states import engine_state

CHAT = "/v1/chat/completions"
HEAD: Message = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}
WHOLE: Message = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]}


def piece(text: bytes, more: bool) -> Message:
    return {"type": "http.response.body", "body": text, "more_body": more}


class FakeHandle:
    """A deployment's handle. Each call gets the next of the scripts: messages, and an exception where one raises."""

    def __init__(self, *scripts: Sequence[Message | Exception]):
        self.scripts = [list(script) for script in scripts]
        self.calls: list[Call] = []
        self.cancelled = 0

    def options(self, **_: Any) -> "FakeHandle":
        return self

    def remote(self, call: Call) -> Any:
        self.calls.append(call)
        return FakeStream(self, self.scripts.pop(0))


class FakeStream:
    def __init__(self, handle: FakeHandle, script: list[Message | Exception]):
        self._handle, self._script = handle, script

    async def __anext__(self) -> Message:
        step = self._script.pop(0)
        if isinstance(step, Exception):
            raise step
        return step

    def cancel(self) -> None:
        self._handle.cancelled += 1


def request_of(body: bytes, headers: dict[bytes, bytes] | None = None, path: str = CHAT) -> Request:
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        return messages.pop()

    scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"a=1"}
    return Request({**scope, "headers": list((headers or {}).items()), "client": ("::1", 7)}, receive)


def answered(handle: FakeHandle, path: str = CHAT) -> tuple[int, dict[str, str], bytes]:
    async def run() -> tuple[int, dict[str, str], bytes]:
        replicas: Any = handle
        response: Any = await Forwarder(replicas, 5.0).answer(request_of(b"{}", path=path))
        pieces: AsyncIterator[bytes] | None = getattr(response, "body_iterator", None)
        body = response.body if pieces is None else b"".join([one async for one in pieces])
        return response.status_code, dict(response.headers), body

    return asyncio.run(run())


def test_a_whole_answer_is_passed_on() -> None:
    status, headers, body = answered(FakeHandle([WHOLE, piece(b'{"a": 1}', False)]))
    assert (status, body) == (200, b'{"a": 1}')
    assert headers["content-type"] == "application/json"


@pytest.mark.parametrize("script", [[], [HEAD]])
def test_a_request_whose_answer_has_not_begun_is_tried_on_another_replica(script: list[Message]) -> None:
    handle = FakeHandle([*script, ActorDiedError()], [HEAD, piece(b"data: 1\n\n", True), piece(b"", False)])
    assert answered(handle)[::2] == (200, b"data: 1\n\n")
    assert handle.calls[0] == handle.calls[1]


def test_three_dead_replicas_are_enough() -> None:
    status, headers, body = answered(FakeHandle(*[[ActorDiedError()] for _ in range(3)]))
    assert status == 503
    assert headers["retry-after"] == "1"
    assert json.loads(body)["error"]["code"] == "unavailable"


@pytest.mark.parametrize(("path", "begins"), [(CHAT, b'data: {"error"'), ("/v1/messages", b"event: error\ndata: ")])
def test_a_stream_that_has_begun_ends_with_an_error_event(path: str, begins: bytes) -> None:
    handle = FakeHandle([HEAD, piece(b"data: 1\n\n", True), ActorDiedError()])
    status, _, body = answered(handle, path)
    first, last = body.split(b"\n\n", 1)
    assert (status, first) == (200, b"data: 1")
    assert last.startswith(begins)
    assert b"the replica that answered has died" in last
    assert len(handle.calls) == 1
    assert handle.cancelled == 1


def test_a_whole_answer_that_breaks_off_is_cut() -> None:
    with pytest.raises(ActorDiedError):
        answered(FakeHandle([WHOLE, piece(b"{", True), ActorDiedError()]))


def test_an_unknown_failure_is_no_reason_to_try_again() -> None:
    handle = FakeHandle([ValueError("secret")])
    status, _, body = answered(handle)
    assert status == 500
    assert b"secret" not in body
    assert handle.cancelled == 1


@pytest.mark.parametrize(
    ("headers", "body", "expected"),
    [
        ({}, b"{}", None),
        ({b"x-emoe-task": b"qa"}, b"{}", "qa"),
        ({b"x-emoe-task": b"qa"}, b'{"emoe": {"task": "sum"}}', "sum"),
        ({b"x-emoe-task": b"qa"}, b'{"emoe": {"task": null}}', "qa"),
        ({b"x-emoe-task": b"qa"}, b'{"emoe": 3}', "qa"),
        ({}, b'{"emoe": {"task": ', None),
        ({}, b'["emoe"]', None),
    ],
)
def test_the_task_is_the_one_that_the_server_finds(
    headers: dict[bytes, bytes], body: bytes, expected: str | None
) -> None:
    assert task_of(headers, body) == expected


def test_a_call_has_all_of_a_request() -> None:
    call = call_of(request_of(b"{}", {b"x-emoe-replica": b"abc", b"host": b"h"}), b"{}")
    assert (call.method, call.path, call.query, call.body) == ("POST", CHAT, b"a=1", b"{}")
    assert (b"host", b"h") in call.headers
    assert (call.replica, call.client) == ("abc", ("::1", 7))


def test_a_replica_answers_publishes_and_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeEngine, "state", lambda _: engine_state())
    server = local_server(engine := FakeEngine(FakeTokenizer()))
    body = json.dumps({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}).encode()
    call = Call(
        "POST", CHAT, CHAT.encode(), b"", [(b"content-type", b"application/json"), (b"x-emoe-task", b"sum")], body
    )

    async def run() -> tuple[list[Message], dict[str, Any], list[dict[str, float]]]:
        messages = [message async for message in server.answer(call)]
        return messages, await server.published(), [await server.deadlines(0.9) for _ in range(2)]

    (head, *pieces), published, counts = asyncio.run(run())
    assert head["status"] == 200
    assert (b"x-emoe-replica", b"replica 7") in head["headers"]
    assert len(json.loads(b"".join(one["body"] for one in pieces))["choices"]) == 1
    assert engine.requests[0]["task"] == "sum"
    assert published == {
        "serves": {"qa": 0.8, "conv": 0.4},
        "coverage": 0.87,
        "resident_share": 0.5,
        "running": 1,
        "waiting": 2,
        "answers": 4,
    }
    slo = engine_state()["scheduler"]["slo"]
    assert counts[0] == {ATTAINED: slo["attained"], ANSWERS: slo["with_slo"], GOAL: 0.9}
    assert counts[1] == {ATTAINED: 0.0, ANSWERS: 0.0, GOAL: 0.9}


def test_a_client_that_leaves_ends_its_request() -> None:
    server = local_server(engine := FakeEngine(FakeTokenizer(), step_seconds=0.01))
    body = json.dumps({"prompt": "hi", "max_tokens": 40, "stream": True}).encode()
    call = Call("POST", "/v1/completions", b"/v1/completions", b"", [(b"content-type", b"application/json")], body)

    async def run() -> None:
        messages = server.answer(call)
        assert (await anext(messages))["status"] == 200
        await anext(messages)
        await messages.aclose()
        for _ in range(100):
            if not engine.running:
                return
            await asyncio.sleep(0.02)
        raise AssertionError("the engine goes on")

    asyncio.run(run())


def router(loads: dict[str, int]) -> Any:
    made: Any = object.__new__(ReplicaRouter)
    made._replica_queue_len_cache = SimpleNamespace(get=lambda replica_id: loads.get(replica_id.unique_id))
    made.initialize_state(routing="task-affine", threshold=2)
    return made


def replica(name: str, **serves: float) -> Any:
    return SimpleNamespace(
        replica_id=SimpleNamespace(unique_id=name), routing_stats={"serves": serves} if serves else {}
    )


def chosen(made: Any, replicas: list[Any], **call: Any) -> list[list[str]]:
    asked = dataclasses.replace(Call("POST", CHAT, b"", b"", [], b""), **call)
    ranks = asyncio.run(made.choose_replicas(replicas, SimpleNamespace(args=[asked])))
    return [[one.replica_id.unique_id for one in rank] for rank in ranks]


def test_the_router_prefers_who_serves_the_task_within_the_threshold() -> None:
    replicas = [replica("a", qa=0.4, sum=0.9), replica("b", qa=0.8, sum=0.5)]
    assert chosen(router({}), replicas, task="qa") == [["b"], ["a"]]
    assert chosen(router({}), replicas, task="sum") == [["a"], ["b"]]
    assert chosen(router({"b": 2}), replicas, task="qa") == [["b"], ["a"]]
    assert chosen(router({"b": 3}), replicas, task="qa") == [["a"], ["b"]]
    assert chosen(router({"b": 1}), replicas) == [["a"], ["b"]]
    assert chosen(router({"a": 1}), [replica("a"), replica("b")], task="qa") == [["b"], ["a"]]
    assert chosen(router({}), replicas[:1], task="qa") == [["a"]]
    assert chosen(router({}), [], task="qa") == []


def test_a_replica_can_be_asked_by_name_while_it_lives() -> None:
    replicas = [replica("a", qa=0.4), replica("b", qa=0.8)]
    assert chosen(router({}), replicas, task="qa", replica="a") == [["a"]]
    assert chosen(router({}), replicas, replica="gone") == [["a", "b"]]


@pytest.mark.parametrize("path", [FLEET, f"/below{FLEET}/"])
def test_the_router_tells_what_it_knows_of_all_replicas(path: str) -> None:
    call = Call("GET", path, b"", b"", [], b"", replica="b")
    pending: Any = SimpleNamespace(args=[call])
    made = router({"b": 3})
    ranks = asyncio.run(made.choose_replicas([replica("b", qa=0.8), replica("a")], pending))
    assert [one.replica_id.unique_id for one in ranks[0]] == ["b"]
    (told,) = pending.args
    assert told.fleet == [
        {"name": "a", "unfinished": 0},
        {"name": "b", "unfinished": 3, "serves": {"qa": 0.8}},
    ]
    pending.args = [dataclasses.replace(call, path=CHAT)]
    asyncio.run(made.choose_replicas([replica("a")], pending))
    assert pending.args[0].fleet == ()


@pytest.mark.parametrize(
    ("recorded", "expected"),
    [({}, 1.5), ({ATTAINED: 9.0, ANSWERS: 10.0}, 3.0), ({ATTAINED: 10.0, ANSWERS: 10.0}, 1.5), ({ANSWERS: 0.0}, 1.5)],
)
def test_the_number_of_replicas_follows_queue_and_deadlines(recorded: dict[str, float], expected: float) -> None:
    context: Any = SimpleNamespace(
        aggregated_metrics={name: {"a": value} for name, value in {GOAL: 0.95, **recorded}.items()},
        config=SimpleNamespace(get_target_ongoing_requests=lambda: 8.0),
        current_num_replicas=2,
        total_num_requests=12.0,
    )
    assert queue_and_deadlines(context)[0] == expected


def test_options_are_those_of_the_server_and_of_replicas() -> None:
    options = ray_app.parse(["--replicas", "3", "--max-replicas", "5", "--expert-memory", "40%"])
    assert (options.replicas, options.most, options.expert_memory) == (3, 5, "40%")
    assert ray_app.parse([]).most == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--replicas", "0"], "--replicas is '0'; expected an integer of at least 1"),
        (["--replicas", "3", "--max-replicas", "2"], "--max-replicas is 2; expected at least the 3 replicas"),
        (["--uds", "/tmp/a"], "--uds is for one server"),
        (["--replica-routing", "nearest"], "there is no routing 'nearest'; expected one of random"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        ray_app.parse(arguments)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
