"""Whatever a client sends, it gets a 4xx in OpenAI's shape, quickly, and the server goes on."""

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from serve.answers import ModelList
from serve.errors import ErrorResponse
from serve.http.body import MAX_BODY_BYTES
from tests.serve.conftest import StartServer
from tests.serve.fake import MAX_MODEL_LEN, FakeEngine, FakeTokenizer

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]
BASIC = {"authorization": "Basic eDp5"}


@pytest.fixture(autouse=True)
def _server_goes_on(client: httpx.Client) -> Iterator[None]:
    yield
    assert client.get("/health").status_code == 200
    assert client.post(COMPLETIONS, json={"prompt": "hi", "max_tokens": 1}).status_code == 200


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error = ErrorResponse.model_validate_json(response.text).error
    assert "\n" not in error.message
    assert response.headers["x-request-id"]
    return error.model_dump()


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("max_tokens", 2**63),
        ("max_tokens", 10**400),
        ("max_tokens", 1.5),
        ("max_tokens", "5"),
        ("max_tokens", True),
        ("temperature", -0.1),
        ("temperature", 1e300),
        ("temperature", "hot"),
        ("top_p", -0.1),
        ("top_p", 1.1),
        ("top_k", -2),
        ("min_p", 2),
        ("n", 0),
        ("n", 10**9),
        ("seed", 2**64),
        ("seed", 0.5),
        ("stop", ""),
        ("stop", ["x", 1]),
        ("stop", ["x"] * 50_000),
        ("stop", "x" * 10_000),
        ("stop", {"a": 1}),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", list(range(1000))),
        ("logprobs", 10**6),
        ("logprobs", -1),
        ("stream", "yes"),
        ("model", 7),
        ("presence_penalty", 2.5),
        ("frequency_penalty", "high"),
        ("repetition_penalty", 0),
        ("logit_bias", {"5": 101}),
        ("logit_bias", {"five": 1}),
        ("logit_bias", {"-5": 1}),
        ("logit_bias", {str(token): 1 for token in range(2000)}),
        ("logit_bias", [5]),
        ("response_format", {"type": "xml"}),
        ("min_tokens", 3),
        ("emoe", []),
        ("stream_options", {"include_usage": True}),
    ],
)
def test_bad_values_name_their_field(client: httpx.Client, path: str, param: str, value: Any) -> None:
    base = {"prompt": "hi"} if path == COMPLETIONS else {"messages": HELLO}
    response = client.post(
        path, content=json.dumps({**base, param: value}), headers={"content-type": "application/json"}
    )
    error = error_of(response, 400)
    assert error["type"] == "invalid_request_error"
    assert error["param"].startswith(param)
    assert param in error["message"]
    assert len(error["message"]) < 500


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (COMPLETIONS, {}, "prompt"),
        (COMPLETIONS, {"prompt": None}, "prompt"),
        (COMPLETIONS, {"prompt": ""}, "prompt"),
        (COMPLETIONS, {"prompt": []}, "prompt"),
        (COMPLETIONS, {"prompt": [[]]}, "prompt"),
        (COMPLETIONS, {"prompt": ["hi", ""]}, "prompt"),
        (COMPLETIONS, {"prompt": ["hi", 5]}, "prompt"),
        (COMPLETIONS, {"prompt": [1, -5]}, "prompt"),
        (COMPLETIONS, {"prompt": [2**40]}, "prompt"),
        (COMPLETIONS, {"prompt": [1000]}, "prompt"),
        (COMPLETIONS, {"prompt": [[1], [1000]]}, "prompt"),
        (COMPLETIONS, {"prompt": [1000], "echo": True}, "prompt"),
        (COMPLETIONS, {"prompt": ["x"] * 1000}, "prompt"),
        (COMPLETIONS, {"prompt": {"text": "hi"}}, "prompt"),
        (COMPLETIONS, {"prompt": "hi", "best_of": 3}, "best_of"),
        (COMPLETIONS, {"prompt": "hi", "suffix": "x"}, "suffix"),
        (COMPLETIONS, {"prompt": "hi", "echo": True, "max_tokens": 0, "stream": True}, "max_tokens"),
        (CHAT, {"messages": HELLO, "echo": True}, "echo"),
        (CHAT, {"messages": HELLO, "best_of": 3}, "best_of"),
        (COMPLETIONS, {"prompt": "hi", "emoe": {"tsak": "qa"}}, "emoe.tsak"),
        (COMPLETIONS, {"prompt": "hi", "emoe": {"routing": "best"}}, "emoe.routing"),
        (COMPLETIONS, {"prompt": "hi", "emoe": {"slo": {"ttft_ms": -1}}}, "emoe.slo.ttft_ms"),
        (COMPLETIONS, {"prompt": "hi", "emoe": {"slo": {"ttft": 1}}}, "emoe.slo.ttft"),
        (COMPLETIONS, {"prompt": "hi", "emoe": {"task": ""}}, "emoe.task"),
        (CHAT, {}, "messages"),
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {"messages": "hello"}, "messages"),
        (CHAT, {"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
        (CHAT, {"messages": [*HELLO, {"role": "user", "content": 5}]}, "messages[1].content"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        (CHAT, {"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls[0].function"),
        (CHAT, {"messages": HELLO, "tools": [{"type": "function"}]}, "tools[0].function"),
        (CHAT, {"messages": HELLO, "tool_choice": "required"}, "tool_choice"),
        (CHAT, {"messages": HELLO, "chat_template": "{{ 1 }}"}, "chat_template"),
        (CHAT, {"messages": HELLO, "top_logprobs": 3}, "top_logprobs"),
        (CHAT, {"messages": HELLO, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        (CHAT, {"messages": HELLO, "max_completion_tokens": 0}, "max_completion_tokens"),
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": HELLO}, "prompt"),
        ("/detokenize", {"tokens": [1, 4096]}, "tokens"),
        ("/detokenize", {"tokens": "x"}, "tokens"),
    ],
)
def test_bad_bodies_name_the_field(client: httpx.Client, path: str, body: Any, param: str) -> None:
    error = error_of(client.post(path, json=body), 400)
    assert error["param"] == param
    assert not re.search(r"\bmust\b|Input should|valid ", error["message"]), (
        "as the library says it: `n is 0; expected ...`"
    )


@pytest.mark.parametrize(
    ("path", "body", "param", "message"),
    [
        (COMPLETIONS, {"prompt": [5, "a"]}, "prompt", "element 1 is a string; token ids are integers from 0"),
        (COMPLETIONS, {"prompt": [-1]}, "prompt", "element 0 is -1; token ids are integers from 0"),
        (COMPLETIONS, {"prompt": [1.5]}, "prompt", "element 0 is 1.5; token ids are integers from 0"),
        (COMPLETIONS, {"prompt": [True]}, "prompt", "element 0 is true; token ids are integers from 0"),
        (COMPLETIONS, {"prompt": [2**40]}, "prompt", "element 0 is an integer beyond 32 bits"),
        (COMPLETIONS, {"prompt": [[1], [2, None]]}, "prompt", "element 1 of prompt 1 is null"),
        (COMPLETIONS, {"prompt": ["a", [5]]}, "prompt", "element 1 is a list, but element 0 is a string"),
        (COMPLETIONS, {"prompt": "a", "stop": [1]}, "stop", "stop: element 0 is 1; expected a string"),
        (
            COMPLETIONS,
            {"prompt": "a", "emoe": {"foo": 1}},
            "emoe.foo",
            "emoe.foo is no known field; expected one of task, routing, tolerance, slo",
        ),
        (
            COMPLETIONS,
            {"prompt": "a", "structured_outputs": {"x": 1}},
            "structured_outputs.x",
            "is no known field; expected one of json, regex",
        ),
        (COMPLETIONS, {"prompt": "a", "emoe": []}, "emoe", "emoe is a list; expected an object"),
        (COMPLETIONS, {}, "prompt", "prompt is missing"),
        (CHAT, {"messages": []}, "messages", "messages has 0 elements; expected at least 1"),
        (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content", "messages[0].content is missing"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": None}]},
            "messages[0].content",
            "messages[0].content is missing",
        ),
        (CHAT, {"messages": [{"role": "wizard", "content": "a"}]}, "messages[0].role", "role is 'wizard'; expected"),
        (CHAT, {"messages": HELLO, "tool_choice": "maybe"}, "tool_choice", "tool_choice is 'maybe'; expected"),
        (CHAT, {"messages": HELLO, "tool_choice": "a b"}, "tool_choice", "tool_choice is a string; expected"),
        *(
            (path, {**body, "seed": seed}, "seed", f"{found}; expected an integer from {-(2**63)} to {2**63 - 1}")
            for path, body in (
                (COMPLETIONS, {"prompt": "a"}),
                (CHAT, {"messages": HELLO}),
                ("/v1/responses", {"input": "a"}),
            )
            for seed in (2**63, -(2**63) - 1, 10**40)
            for found in ("seed is an integer beyond 64 bits",)
        ),
        (CHAT, {"messages": HELLO, "temperature": "hot"}, "temperature", "temperature is a string; expected a number"),
    ],
)
def test_messages_say_what_is_wrong(client: httpx.Client, path: str, body: Any, param: str, message: str) -> None:
    error = error_of(client.post(path, json=body), 400)
    assert error["param"] == param
    assert message in error["message"]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/tokenize"])
@pytest.mark.parametrize("body", [b"[]", b'"x"', b"5", b"null", b""])
def test_a_body_that_is_no_object(client: httpx.Client, path: str, body: bytes) -> None:
    error = error_of(client.post(path, content=body, headers={"content-type": "application/json"}), 400)
    assert error["message"] == "the body is no object; expected a JSON object"


def test_a_body_that_is_not_utf_8(client: httpx.Client) -> None:
    headers = {"content-type": "application/json; charset=latin-1"}
    error = error_of(client.post(COMPLETIONS, content='{"prompt": "für"}'.encode("latin-1"), headers=headers), 400)
    assert error["message"] == "the request body is not UTF-8: invalid start byte at byte 13"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b'{"prompt": "\xff\xfe"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "hi", "temperature": NaN}',
        b'{"prompt": "hi", "temperature": Infinity}',
        b'{"prompt": "hi", "temperature": 1e999}',
        b'{"prompt": ' + b"[" * 20_000 + b"]" * 20_000 + b"}",
        b'{"prompt": "hi", "x": ' + b'{"a":' * 20_000 + b"1" + b"}" * 20_000 + b"}",
        b'{"prompt": "hi", "max_tokens": ' + b"9" * 100_000 + b"}",
        b"\x00" * 1000,
    ],
    ids=lambda content: repr(content[:40]),
)
def test_bodies_that_are_not_json(client: httpx.Client, content: bytes) -> None:
    error_of(client.post(COMPLETIONS, content=content, headers={"content-type": "application/json"}), 400)


def test_context_length(client: httpx.Client) -> None:
    def code(path: str, **body: Any) -> tuple[str, str]:
        error = error_of(client.post(path, json=body), 400)
        assert "this model's maximum context length is 100 tokens" in error["message"]  # litellm looks for this
        return error["code"], error["param"]

    exceeded = "context_length_exceeded"
    assert code(COMPLETIONS, prompt=[1] * MAX_MODEL_LEN) == (exceeded, "prompt")
    assert code(COMPLETIONS, prompt="x" * 200) == (exceeded, "prompt")
    assert code(COMPLETIONS, prompt=[1] * 50, max_tokens=51) == (exceeded, "max_tokens")
    assert code(CHAT, messages=[{"role": "user", "content": "x" * 200}]) == (exceeded, "messages")
    assert code(CHAT, messages=HELLO, max_completion_tokens=99) == (exceeded, "max_completion_tokens")


def test_megabytes_of_prompt_are_refused_without_tokenizing(client: httpx.Client) -> None:
    error = error_of(client.post(COMPLETIONS, json={"prompt": "x" * 7_000_000}), 400)
    assert error["code"] == "context_length_exceeded"
    assert "the prompt is too long: it has 7000000 characters" in error["message"]


def test_large_bodies(client: httpx.Client) -> None:
    headers = {"content-type": "application/json"}
    body = b'{"prompt": "' + b"x" * (MAX_BODY_BYTES + 2**20) + b'"}'
    assert error_of(client.post(COMPLETIONS, content=body, headers=headers), 413)["code"] == "body_too_large"

    def chunks() -> Iterator[bytes]:
        for _ in range(9):
            yield b" " * 2**20

    error_of(client.post(COMPLETIONS, content=chunks(), headers=headers), 413)


def test_content_type(client: httpx.Client) -> None:
    error_of(client.post(COMPLETIONS, data={"prompt": "hi"}), 415)
    error_of(client.post(COMPLETIONS, content=b'{"prompt": "hi"}'), 415)


def test_unknown_model_path_and_method(client: httpx.Client) -> None:
    for path, body in ((COMPLETIONS, {"prompt": "hi"}), (CHAT, {"messages": HELLO}), ("/tokenize", {"prompt": "hi"})):
        error = error_of(client.post(path, json={**body, "model": "gpt\n4"}), 404)
        assert (error["code"], error["param"]) == ("model_not_found", "model")
    error_of(client.get("/v1/nothing"), 404)
    error_of(client.get("/v1/models/other"), 404)
    response = client.get(COMPLETIONS)
    error_of(response, 405)
    assert response.headers["allow"] == "POST"


@pytest.mark.parametrize("request_id", ["a b", "x" * 129, "é", "a%0a", '"', "req/1", "{a}", "a,b", ""])
def test_request_ids_of_other_characters_are_replaced(client: httpx.Client, request_id: str) -> None:
    headers = [(b"x-request-id", request_id.encode())]
    ids = set()
    for _ in range(2):
        response = client.get("/health", headers=headers)
        assert response.status_code == 200
        ids.add(response.headers["x-request-id"])
    assert len(ids) == 2
    assert all(re.fullmatch("[0-9a-f]{32}", fresh) for fresh in ids)
    assert re.fullmatch("[0-9a-f]{32}", client.get("/nothing", headers=headers).headers["x-request-id"])


def test_request_ids_are_echoed(client: httpx.Client) -> None:
    assert client.get("/health", headers={"x-request-id": "abc-1.2:3_4"}).headers["x-request-id"] == "abc-1.2:3_4"


def test_documents_need_no_key_and_ask_for_it(start_server: StartServer, client: httpx.Client) -> None:
    with start_server(FakeEngine(FakeTokenizer()), api_keys=["secret"]) as guarded:
        assert "/openapi.json" in guarded.get("/docs").text
        assert guarded.get("/redoc").status_code == 200
        schema = guarded.get("/openapi.json").json()
    schemes = schema["components"]["securitySchemes"]
    assert [scheme["type"] for scheme in schemes.values()] == ["http", "apiKey"]
    assert schema["security"] == [{scheme: []} for scheme in schemes]  # one of them is enough
    for path in ("/health", "/v1/health", "/ready", "/metrics"):
        assert schema["paths"][path]["get"]["security"] == []
    assert "security" not in schema["paths"][COMPLETIONS]["post"]
    assert "security" not in client.get("/openapi.json").json()


def test_api_keys(start_server: StartServer) -> None:
    with start_server(FakeEngine(FakeTokenizer()), api_keys=["secret", "other"]) as guarded:
        assert guarded.get("/health").status_code == 200
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic secret"}):
            response = guarded.get("/v1/models", headers=headers)
            assert error_of(response, 401)["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"
        assert guarded.get("/v1/models", headers=[(b"authorization", b"Bearer \xff")]).status_code == 401
        assert guarded.get("/v1/models", headers=[(b"x-api-key", b"\xff")]).status_code == 401
        for name in ("x-api-key", "authorization"):
            assert guarded.get("/v1/models", headers={name: ""}).status_code == 401
        assert guarded.get("/v1/models/", headers={"x-api-key": "secre"}).status_code == 401
        for key in ("secret", "other"):
            for headers in ({"authorization": f"Bearer {key}"}, {"x-api-key": key}, {"x-api-key": key, **BASIC}):
                models = guarded.get("/v1/models", headers=headers)
                assert [card.id for card in ModelList.model_validate_json(models.text).data] == ["fake", "alias"]
                assert guarded.post(COMPLETIONS, json={"prompt": "hi"}, headers=headers).status_code == 200


def test_more_log_probabilities_than_memory_has_room_for(start_server: StartServer) -> None:
    """Each number is within its bounds; what they come to is not."""
    body = {"prompt": ["a"] * 15, "n": 64, "max_tokens": 390, "logprobs": 20}
    with start_server(FakeEngine(FakeTokenizer()), max_model_len=400) as client:
        error = error_of(client.post(COMPLETIONS, json=body), 400)
        assert error["param"] == "logprobs"
        assert f"may have {15 * 64 * 390 * 21} log probabilities" in error["message"]
        assert f"at most {2**22} are taken" in error["message"]
        assert client.post(COMPLETIONS, json={**body, "n": 1, "max_tokens": 2}).status_code == 200
