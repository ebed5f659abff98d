"""Routes that do not generate, and the server under failure, overload and clients that leave."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.serve.conftest import StartServer
from tests.serve.events import events_of
from tests.serve.fake import MAX_MODEL_LEN, FakeEngine, FakeTokenizer
from tests.serve.states import engine_state

COMPLETIONS = "/v1/completions"


def wait_until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.005)


def ask(client: httpx.Client, **body: Any) -> httpx.Response:
    return client.post(COMPLETIONS, json={"prompt": "hi", "max_tokens": 4, **body})


def test_models(client: httpx.Client) -> None:
    cards = client.get("/v1/models").json()
    assert cards["object"] == "list"
    assert [card["id"] for card in cards["data"]] == ["fake", "alias"]
    assert client.get("/v1/models/alias").json()["max_model_len"] == MAX_MODEL_LEN


def test_tokenize_and_back(client: httpx.Client) -> None:
    answer = client.post("/tokenize", json={"prompt": "hi", "return_token_strs": True}).json()
    assert answer == {
        "count": 3,
        "max_model_len": MAX_MODEL_LEN,
        "tokens": [1, 104, 105],
        "token_strs": ["\x01", "h", "i"],
    }
    plain = client.post("/tokenize", json={"prompt": "hi", "add_special_tokens": False}).json()
    assert plain == {"count": 2, "max_model_len": MAX_MODEL_LEN, "tokens": [104, 105]}
    assert client.post("/detokenize", json={"tokens": plain["tokens"]}).json() == {"prompt": "hi"}
    messages = [{"role": "user", "content": "hello"}]
    chat = client.post("/tokenize", json={"messages": messages, "add_generation_prompt": False}).json()
    assert client.post("/detokenize", json={"tokens": chat["tokens"]}).json() == {"prompt": "user:hello;"}


def test_tasks_are_those_of_the_profile(start_server: StartServer) -> None:
    with start_server(FakeEngine(FakeTokenizer()), tasks=("qa", "sum")) as client:
        for task in ("qa", "other"):
            assert ask(client, emoe={"task": task}).status_code == 200
        refused = ask(client, emoe={"task": "poem"})
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "emoe.task"
        assert "qa, sum, other" in refused.json()["error"]["message"]


def test_web_pages_of_allowed_origins_only(start_server: StartServer, client: httpx.Client) -> None:
    page = "https://example.org"
    asking = {"origin": page, "access-control-request-method": "POST", "access-control-request-headers": "content-type"}
    assert "access-control-allow-origin" not in client.options(COMPLETIONS, headers=asking).headers
    with start_server(FakeEngine(FakeTokenizer()), allowed_origins=[page], api_keys=["secret"]) as open_client:
        assert open_client.options(COMPLETIONS, headers=asking).headers["access-control-allow-origin"] == page
        assert open_client.options(COMPLETIONS, headers={**asking, "origin": "https://other"}).status_code == 400
        answer = open_client.get("/v1/models", headers={"origin": page, "authorization": "Bearer secret"})
        assert answer.headers["access-control-allow-origin"] == page
        refused = open_client.get("/v1/models", headers={"origin": page})
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, page)


def test_state(client: httpx.Client) -> None:
    assert client.get("/v1/emoe/state").json() == {"model": "fake", "residency": {"experts": [[0, 1]]}, "running": 0}


def test_all_of_the_state_is_passed_on(start_server: StartServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeEngine, "state", lambda _: engine_state() | {"more": {"than": ["described"]}})
    with start_server(FakeEngine(FakeTokenizer())) as client:
        assert client.get("/v1/emoe/state").json() == engine_state() | {"more": {"than": ["described"]}}
        described = client.get("/openapi.json").json()["components"]["schemas"]
    state = engine_state()
    assert state["residency"].keys() <= described["ResidencyState"]["properties"].keys()
    assert state["regret"].keys() == described["RegretState"]["properties"].keys()
    assert state["regret"]["policies"]["lru"].keys() == described["RivalState"]["properties"].keys()


def test_openapi_describes_every_route(client: httpx.Client) -> None:
    schema = client.get("/openapi.json").json()
    assert {COMPLETIONS, "/v1/chat/completions", "/v1/models", "/health", "/tokenize"} <= schema["paths"].keys()
    body = schema["paths"][COMPLETIONS]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body == {"$ref": "#/components/schemas/CompletionRequest"}
    prompt = schema["components"]["schemas"]["CompletionRequest"]["properties"]["prompt"]
    assert len(prompt["anyOf"]) == 4
    assert schema["paths"][COMPLETIONS]["post"]["responses"].keys() == {"200", "4XX", "5XX"}
    error = {"schema": {"$ref": "#/components/schemas/ErrorResponse"}}
    assert schema["paths"][COMPLETIONS]["post"]["responses"]["4XX"]["content"]["application/json"] == error


def test_many_requests_at_once(start_server: StartServer) -> None:
    with start_server(FakeEngine(FakeTokenizer())) as client, ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda seed: ask(client, seed=seed % 26).json(), range(64)))
    texts = [answer["choices"][0]["text"] for answer in answers]
    alphabet = "abcdefghijklmnopqrstuvwxyz" * 2
    assert texts == [alphabet[seed % 26 : seed % 26 + 4] for seed in range(64)]


def test_full_queue_answers_at_once_and_recovers(start_server: StartServer) -> None:
    engine = FakeEngine(FakeTokenizer())
    engine.gate.clear()
    with start_server(engine, max_unfinished=2) as client, ThreadPoolExecutor(2) as pool:
        accepted = [pool.submit(ask, client) for _ in range(2)]
        wait_until(lambda: len(engine.requests) == 2)
        refused = ask(client)
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "queue_full"
        assert int(refused.headers["retry-after"]) >= 1
        assert client.get("/health").status_code == 200
        engine.gate.set()
        assert [future.result().status_code for future in accepted] == [200, 200]
        assert ask(client).status_code == 200
        assert ask(client, prompt=["a", "b", "c"]).status_code == 400


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_the_engine(start_server: StartServer, stream: bool) -> None:
    engine = FakeEngine(FakeTokenizer(), step_seconds=0.1)
    with start_server(engine, max_unfinished=1) as client:
        if stream:
            engine.gate.clear()
        patience = httpx.Timeout(10, read=0.2)
        with httpx.Client(base_url=client.base_url, timeout=patience) as hasty, pytest.raises(httpx.ReadTimeout):
            ask(hasty, max_tokens=90, stream=stream)
        wait_until(lambda: bool(engine.requests))
        wait_until(lambda: not engine.running)
        engine.gate.set()
        assert ask(client).status_code == 200


def test_a_stream_cut_in_the_middle_frees_the_engine(start_server: StartServer) -> None:
    engine = FakeEngine(FakeTokenizer(), step_seconds=0.1)
    with start_server(engine) as client:
        body = {"prompt": ["hi", "you"], "max_tokens": 90, "stream": True}
        with client.stream("POST", COMPLETIONS, json=body) as response:
            next(response.iter_lines())
            assert len(engine.running) == 2
        wait_until(lambda: not engine.running)


def test_a_failing_step_fails_its_batch_only(start_server: StartServer, caplog: pytest.LogCaptureFixture) -> None:
    engine = FakeEngine(FakeTokenizer())
    engine.gate.clear()
    with start_server(engine) as client, ThreadPoolExecutor(2) as pool:
        unlucky = pool.submit(ask, client)
        wait_until(lambda: len(engine.requests) == 1)
        engine.failing_ids = set(engine.running)
        lucky = pool.submit(ask, client)
        wait_until(lambda: len(engine.requests) == 2)
        engine.failures = [RuntimeError("device\nlost")]
        engine.gate.set()
        assert unlucky.result().status_code == 500
        error = unlucky.result().json()["error"]
        assert error["type"] == "server_error"
        assert "RuntimeError" in error["message"]
        assert "lost" not in error["message"]
        assert lucky.result().json()["choices"][0]["text"] == "abcd"
        assert ask(client).status_code == 200
    assert "device" in caplog.text


def test_a_failure_reaches_open_streams_as_an_event(start_server: StartServer) -> None:
    engine = FakeEngine(FakeTokenizer(), step_seconds=0.1)
    with start_server(engine) as client:
        threading.Timer(0.1, lambda: engine.failures.append(RuntimeError())).start()
        events = events_of(client, COMPLETIONS, prompt="hi", max_tokens=90, stream=True)
        assert events[-1]["error"]["code"] == "internal_error"
        assert not engine.running
        assert client.get("/health").status_code == 200


def test_health_after_repeated_failures_and_after_death(start_server: StartServer) -> None:
    engine = FakeEngine(FakeTokenizer())
    with start_server(engine) as client:
        engine.failures = [RuntimeError() for _ in range(3)]
        assert [ask(client).status_code for _ in range(3)] == [500] * 3
        assert client.get("/health").status_code == 503
        assert ask(client).status_code == 200
        assert client.get("/health").status_code == 200
        engine.failures = [SystemExit()]  # pyright: ignore[reportAttributeAccessIssue]
        assert ask(client).status_code == 500
        wait_until(lambda: client.get("/health").status_code == 503)
        assert ask(client).status_code == 503
        assert client.get("/v1/emoe/state").status_code == 503
