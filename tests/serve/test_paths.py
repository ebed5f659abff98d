"""Requests that mean the same: HEAD and GET, slashes at the end, behind a proxy with a path of its own."""

import asyncio
import logging
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from emoe_jax.errors import CheckpointError
from serve.app import create_app
from serve.http.paths import OWN_PATHS, hides_own_path
from serve.service import Service
from serve.text import TextCodec
from serve.worker import EngineWorker
from tests.serve.conftest import StartServer, running_server
from tests.serve.fake import MAX_MODEL_LEN, VOCAB_SIZE, FakeEngine, FakeTokenizer
from tests.serve.test_server import COMPLETIONS, wait_until

HELLO = [{"role": "user", "content": "hello"}]
GET_PATHS = (
    "/", "/health", "/v1/health", "/ready", "/metrics", "/v1/models", "/v1/models/alias", "/v1/emoe/state",
    "/v1/emoe/replicas", "/docs", "/redoc", "/openapi.json",
)  # fmt: skip
POST_BODIES: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": "hi", "max_tokens": 3},
    "/v1/chat/completions": {"messages": HELLO, "max_tokens": 3},
    "/v1/messages": {"messages": HELLO, "max_tokens": 3},
    "/v1/messages/count_tokens": {"messages": HELLO},
    "/v1/responses": {"input": "hello", "max_output_tokens": 3},
    "/tokenize": {"prompt": "hi"},
    "/detokenize": {"tokens": [104]},
}
KEY = {"authorization": "Bearer secret"}
ROOT = "/my/llm-1"


@pytest.fixture(scope="module")
def guarded() -> Iterator[httpx.Client]:
    """A server with an API key, which a proxy has under a path of its own."""
    with running_server(FakeEngine(FakeTokenizer()), api_keys=["secret"], root_path=ROOT) as client:
        yield client


def test_all_paths_are_known(client: httpx.Client) -> None:
    paths = client.get("/openapi.json").json()["paths"].keys()
    below = {path for path in paths if path.startswith(("/v1/models/", "/v1/responses/"))}
    assert paths - below == set(OWN_PATHS) - {
        "/", "/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json",
    }  # fmt: skip
    for path in OWN_PATHS:
        assert client.get(path).status_code == (405 if path in POST_BODIES else 200)


@pytest.mark.parametrize("path", GET_PATHS)
@pytest.mark.parametrize("end", ["", "/"])
def test_head_is_get_without_a_body(client: httpx.Client, path: str, end: str) -> None:
    got, head = client.get(path + end), client.head(path + end)
    assert head.status_code == got.status_code == 200
    assert head.content == b""
    assert head.headers.keys() == got.headers.keys()
    assert head.headers["content-type"] == got.headers["content-type"]
    assert int(head.headers["content-length"]) > 0


def test_head_of_what_get_refuses(client: httpx.Client, guarded: httpx.Client) -> None:
    for path in POST_BODIES:
        refused = client.head(path)
        assert (refused.status_code, refused.headers["allow"], refused.content) == (405, "POST", b"")
    assert client.head("/v1/nothing").status_code == client.head("/v1/models/nothing").status_code == 404
    assert guarded.head("/v1/models").status_code == guarded.head(f"{ROOT}/v1/emoe/state").status_code == 401
    assert guarded.head("/v1/models", headers=KEY).status_code == 200
    assert client.get("/health").status_code == 200  # on the same connection: nothing was left in it


def test_the_log_says_what_was_asked(client: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "serve.requests"):
        client.head("/health/")
        client.head("/v1/nothing")
        wait_until(lambda: bool(caplog.records))
    (record,) = [record for record in caplog.records if record.name == "serve.requests"]
    fields = vars(record)["fields"]
    assert (fields["method"], fields["status"]) == ("HEAD", 404)


@pytest.mark.parametrize("prefix", ["", ROOT])
@pytest.mark.parametrize("end", ["", "/", "//"])
def test_slashes_and_a_proxy_s_path_change_nothing(guarded: httpx.Client, prefix: str, end: str) -> None:
    for path in GET_PATHS:
        answer = guarded.get(prefix + path + end, headers=KEY)
        assert (answer.status_code, answer.history) == (200, []), path
    for path, body in POST_BODIES.items():
        answer = guarded.post(prefix + path + end, json=body, headers=KEY)
        assert (answer.status_code, answer.history) == (200, []), path
        error = guarded.post(prefix + path + end, json={}, headers=KEY).json()["error"]
        assert error["type"] == "invalid_request_error"
        assert guarded.post(prefix + path + end, json=body).status_code == 401
    with guarded.stream(
        "POST", prefix + COMPLETIONS + end, json={"prompt": "hi", "stream": True}, headers=KEY
    ) as stream:
        assert [line for line in stream.iter_lines() if line][-1] == "data: [DONE]"
    for path in ("/health", "/metrics", "/ready"):
        assert guarded.get(prefix + path + end).status_code == 200
    for path in ("/v1/models", "/v1/emoe/state", "/v1/models/alias"):
        assert guarded.get(prefix + path + end).status_code == 401


def test_only_a_whole_proxy_s_path_is_one(guarded: httpx.Client) -> None:
    for path in (f"{ROOT}health", "/my/health", f"/my{ROOT}/health", f"{ROOT}{ROOT}/v1/nothing"):
        assert guarded.get(path, headers=KEY).status_code == 404
    assert guarded.get(ROOT).text.startswith("<!doctype html>")


def test_documents_know_the_proxy_s_path(guarded: httpx.Client, client: httpx.Client) -> None:
    schema = guarded.get("/openapi.json").json()
    assert schema["servers"] == [{"url": ROOT}]
    assert "servers" not in client.get("/openapi.json").json()
    assert not [path for path in schema["paths"] if path.startswith(ROOT)]
    assert f"{ROOT}/openapi.json" in guarded.get(f"{ROOT}/docs").text


@pytest.mark.parametrize(
    ("root", "hidden"),
    [("/v1", True), ("/v1/emoe", True), ("/health", True), ("/docs", True), ("/v", False), ("/llm", False),
     ("/healthy", False), ("/v1/x", False)],
)  # fmt: skip
def test_a_proxy_s_path_that_hides_one_of_ours(root: str, hidden: bool) -> None:
    assert (hides_own_path(root) is not None) == hidden


@pytest.mark.parametrize(("path", "body"), POST_BODIES.items())
def test_the_empty_model_is_the_default_model(client: httpx.Client, path: str, body: dict[str, Any]) -> None:
    answers = [client.post(path, json={**body, **model}).json() for model in ({}, {"model": ""}, {"model": None})]
    assert answers[0].get("model", "fake") == "fake"
    for answer in answers:
        for item in answer.get("output", ()):
            item.pop("id")  # each has its own
    said = [
        next((answer[key] for key in ("choices", "content", "output") if key in answer), answer) for answer in answers
    ]
    assert said[0] == said[1] == said[2]
    assert client.post(path, json={**body, "model": " "}).status_code == 404


@pytest.mark.parametrize(
    ("path", "named"),
    [
        ("%2F", "/"),
        ("%2f/", "/"),
        ("%2F%2F", "//"),
        ("fake%2F", "fake/"),
        ("owner%2Ffake/", "owner/fake"),
        ("%20", " "),
    ],
)
def test_an_escaped_slash_is_part_of_a_models_name(
    client: httpx.Client, guarded: httpx.Client, path: str, named: str
) -> None:
    for answer in (
        client.get(f"/v1/models/{path}"),
        client.head(f"/v1/models/{path}"),
        guarded.get(f"{ROOT}/v1/models/{path}", headers=KEY),
    ):
        assert answer.status_code == 404
        if answer.request.method == "GET":
            assert repr(named) in answer.json()["error"]["message"]
    assert client.get("/v1/models///").json()["object"] == "list"


def test_ready_says_whether_requests_are_taken(start_server: StartServer) -> None:
    engine = FakeEngine(FakeTokenizer())
    with start_server(engine) as client:
        assert client.get("/ready").json() == client.get("/v1/health").json() == {"status": "ok"}
        engine.failures = [SystemExit()]  # pyright: ignore[reportAttributeAccessIssue]
        assert client.post(COMPLETIONS, json={"prompt": "hi"}).status_code == 500
        wait_until(lambda: client.get("/ready").status_code == 503)
        assert client.get("/v1/health").status_code == client.get("/health").status_code == 503


def fail_a_step(client: httpx.Client, engine: FakeEngine, error: Exception) -> None:
    engine.failures = [error]
    assert client.post(COMPLETIONS, json={"prompt": "hi"}).status_code == 500


def test_steps_that_fail_in_a_row_are_trouble_for_a_while(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = FakeEngine(FakeTokenizer())
    with start_server(engine) as client:
        for count in (2, 2):  # a success in between ends the run
            for _ in range(count):
                fail_a_step(client, engine, RuntimeError("the device is gone"))
            assert client.post(COMPLETIONS, json={"prompt": "hi"}).status_code == 200
        for status in (200, 200, 503):
            fail_a_step(client, engine, RuntimeError("the device is gone"))
            assert client.get("/health").status_code == client.get("/ready").status_code == status
        with monkeypatch.context() as patch:  # time goes by, and nobody sends a request
            patch.setattr("serve.worker.TROUBLE_SECONDS", 0.0)
            assert client.get("/health").status_code == client.get("/ready").status_code == 200
            fail_a_step(client, engine, RuntimeError("the device is gone"))  # the first of a new run
        assert client.get("/health").status_code == 200


def test_an_expert_that_cannot_be_read_is_no_trouble_of_the_engine(start_server: StartServer) -> None:
    engine = FakeEngine(FakeTokenizer())
    with start_server(engine) as client:
        for _ in range(2):
            fail_a_step(client, engine, RuntimeError("the device is gone"))
        for _ in range(5):
            fail_a_step(client, engine, CheckpointError("model.safetensors: tensor w1 cannot be read"))
            assert client.get("/health").status_code == client.get("/ready").status_code == 200
        fail_a_step(client, engine, RuntimeError("the device is gone"))  # they have ended no run either
        assert client.get("/health").status_code == 503


def test_a_server_that_drains_is_healthy_and_not_ready() -> None:
    engine = FakeEngine(FakeTokenizer())
    worker = EngineWorker(engine, 4)
    service = Service(("fake",), TextCodec(FakeTokenizer(), VOCAB_SIZE, MAX_MODEL_LEN), worker)

    async def probe() -> tuple[list[int], int]:
        app = create_app(service)
        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://x") as http,
        ):
            engine.gate.clear()
            running = asyncio.create_task(http.post(COMPLETIONS, json={"prompt": "hi", "max_tokens": 3}))
            while not worker.unfinished:
                await asyncio.sleep(0.01)
            before = (await http.get("/ready")).status_code
            draining = asyncio.create_task(worker.drain(30.0))
            await asyncio.sleep(0.05)
            statuses = [(await http.get(path)).status_code for path in ("/ready", "/health", "/v1/health")]
            refused = await http.post(COMPLETIONS, json={"prompt": "hi"})
            engine.gate.set()
            answer = await running
            await draining
            return [before, *statuses, refused.status_code], answer.status_code

    assert asyncio.run(probe()) == ([200, 503, 200, 200, 503], 200)
