"""Anthropic's API: the same answers in its shapes, whole and as named events."""

import json
from typing import Any

import httpx
import pytest

from emoe_jax.requests.structured_params import StructuredOutputsParams
from serve.errors import MessagesError
from serve.messages.routes import MessagesResponse
from serve.parsing.forms import AnswerForm
from serve.reader import INVALID_JSON, as_object
from tests.serve.conftest import StartServer
from tests.serve.fake import FakeEngine, FakeTokenizer
from tests.serve.scripted import ScriptedEngine

MESSAGES = "/v1/messages"
COUNT = "/v1/messages/count_tokens"
HELLO = [{"role": "user", "content": "hi"}]
FORM = AnswerForm("think", "hermes")
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [{"name": "f", "description": "It does f.", "input_schema": CITY}, {"name": "g", "input_schema": {}}]
F = '<tool_call>{"name": "f", "arguments": {"city": "Oslo"}}</tool_call>'
G = '<tool_call>{"name": "g", "arguments": {}}</tool_call>'


def events_of(client: httpx.Client, **body: Any) -> list[dict[str, Any]]:
    """All events, each of which repeats its name in its JSON."""
    with client.stream("POST", MESSAGES, json={"stream": True, **body}) as response:
        assert response.status_code == 200, response.read()
        blocks = "".join(response.iter_text()).strip().split("\n\n")
    events = []
    for block in blocks:
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


def assembled(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that the events put together, as Anthropic's clients do."""
    message, arguments, is_open = dict(events[0]["message"]), "", False
    assert [event["type"] for event in events].count("message_start") == 1
    assert events[-1]["type"] == "message_stop"
    for event in events[1:-1]:
        match event["type"]:
            case "content_block_start":
                assert (event["index"], is_open) == (len(message["content"]), False)
                message["content"].append(dict(event["content_block"]))
                arguments, is_open = "", True
            case "content_block_delta":
                assert (event["index"], is_open) == (len(message["content"]) - 1, True)
                block, delta = message["content"][-1], dict(event["delta"])
                kind = delta.pop("type")
                ((field, text),) = delta.items()
                if kind == "input_json_delta":
                    arguments += text
                else:
                    assert kind == f"{block['type']}_delta"
                    block[field] += text
            case "content_block_stop":
                is_open = False
                if message["content"][-1]["type"] == "tool_use":
                    message["content"][-1]["input"] = as_object(arguments)
            case "message_delta":
                message |= event["delta"] | {"usage": event["usage"], "emoe": event["emoe"]}
    return message


@pytest.mark.parametrize(
    ("says", "body", "content", "reason", "stop"),
    [
        ("hello", {}, [{"type": "text", "text": "hello"}], "end_turn", None),
        ("hello", {"max_tokens": 2}, [{"type": "text", "text": "he"}], "max_tokens", None),
        ("hello", {"stop_sequences": ["x", "lo"]}, [{"type": "text", "text": "hel"}], "stop_sequence", "lo"),
        (
            "<think>2+2</think>4",
            {},
            [{"type": "thinking", "thinking": "2+2", "signature": ""}, {"type": "text", "text": "4"}],
            "end_turn",
            None,
        ),
        (
            f"Well: {F}{G}",
            {"tools": TOOLS},
            [
                {"type": "text", "text": "Well:"},
                {"type": "tool_use", "name": "f", "input": {"city": "Oslo"}},
                {"type": "tool_use", "name": "g", "input": {}},
            ],
            "tool_use",
            None,
        ),
        (
            F,
            {"tools": TOOLS, "max_tokens": 50},
            [{"type": "tool_use", "name": "f", "input": {"city": "Os"}}],
            "max_tokens",
            None,
        ),
        (
            f"{F}{G}",
            {"tools": TOOLS, "tool_choice": {"type": "auto", "disable_parallel_tool_use": True}},
            [{"type": "tool_use", "name": "f", "input": {"city": "Oslo"}}],
            "tool_use",
            None,
        ),
        ("", {}, [], "end_turn", None),
    ],
)
def test_whole_and_streamed_alike(
    start_server: StartServer, says: str, body: dict[str, Any], content: list[Any], reason: str, stop: str | None
) -> None:
    body = {"messages": HELLO, "max_tokens": 500, **body}
    with start_server(ScriptedEngine(says), form=FORM, max_model_len=1000) as client:
        response = client.post(MESSAGES, json=body)
        streamed = assembled(events_of(client, **body))
    assert response.status_code == 200, response.text
    MessagesResponse.model_validate_json(response.text)
    answer = response.json()
    assert (answer["type"], answer["role"], answer["model"]) == ("message", "assistant", "fake")
    assert answer["id"].startswith("msg_")
    prompt = len("user:hi;assistant:") if "tools" not in body else len("f();g();user:hi;assistant:")
    for message in (answer, streamed):
        ids = [block.pop("id") for block in message["content"] if block["type"] == "tool_use"]
        assert len(set(ids)) == len(ids)
        assert message["content"] == content
        assert (message["stop_reason"], message["stop_sequence"]) == (reason, stop)
        usage = message["usage"]
        assert usage["input_tokens"] + usage["cache_read_input_tokens"] == prompt
        assert usage["cache_read_input_tokens"] == 1
        assert message["emoe"]["task"] == "conv"
    assert answer["usage"] == streamed["usage"]
    assert 0 < answer["usage"]["output_tokens"] <= len(says) + 1


def test_text_streams_as_it_comes(start_server: StartServer) -> None:
    with start_server(ScriptedEngine("abc")) as client:
        events = events_of(client, messages=HELLO, max_tokens=9)
    assert [event["type"] for event in events] == [
        *("message_start", "content_block_start", *["content_block_delta"] * 3, "content_block_stop"),
        *("message_delta", "message_stop"),
    ]
    assert [event["delta"]["text"] for event in events[2:5]] == ["a", "b", "c"]
    assert events[0]["message"]["usage"]["input_tokens"] == len("user:hi;assistant:")


def prompt_of(client: httpx.Client, engine: FakeEngine, **body: Any) -> str:
    answer = client.post(MESSAGES, json={"messages": HELLO, "max_tokens": 1, **body})
    assert answer.status_code == 200, answer.text
    prompt = engine.requests[-1]["prompt"]
    body.pop("stop_sequences", None)
    assert client.post(COUNT, json={"messages": HELLO, **body}).json() == {"input_tokens": len(prompt)}
    return FakeTokenizer().decode(prompt)


def test_conversations_reach_the_template(start_server: StartServer) -> None:
    engine = ScriptedEngine("hi")
    with start_server(engine, form=FORM, max_model_len=1000) as client:

        def prompt(**body: Any) -> str:
            return prompt_of(client, engine, **body)

        texts = [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "b"}]
        assert prompt() == "user:hi;assistant:"
        assert prompt(system="be kind") == "system:be kind;user:hi;assistant:"
        assert prompt(system=texts, messages=[{"role": "user", "content": texts}]) == "system:a\nb;user:a\nb;assistant:"
        assert prompt(messages=[*HELLO, {"role": "assistant", "content": "we"}]) == "user:hi;assistant:we"
        assert prompt(thinking={"type": "enabled", "budget_tokens": 5}) == "enable_thinking=True;user:hi;assistant:"
        assert prompt(thinking={"type": "disabled"}) == "enable_thinking=False;user:hi;assistant:"
        use = {"type": "tool_use", "id": "t1", "name": "f", "input": {"city": "Oslo"}}
        thought = {"type": "thinking", "thinking": "well", "signature": "s"}
        results = [
            {"type": "tool_result", "tool_use_id": "t1", "content": "7"},
            {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "8"}]},
            {"type": "tool_result", "tool_use_id": "t1"},
            {"type": "text", "text": "so?"},
        ]
        history = [*HELLO, {"role": "assistant", "content": [thought, use]}, {"role": "user", "content": results}]
        told = prompt(messages=history, tools=TOOLS)
        assert told == "f();g();user:hi;assistant:;tool:7;tool:8;tool:;user:so?;assistant:"


def test_what_becomes_of_a_request(start_server: StartServer) -> None:
    engine = ScriptedEngine("hi")
    body = {"messages": HELLO, "max_tokens": 7, "temperature": 0.5, "top_p": 0.9, "top_k": 3, "stop_sequences": ["a"]}
    body |= {"emoe": {"routing": "exact"}, "cache_salt": "s", "metadata": {"user_id": "u"}}
    with start_server(engine, form=FORM) as client:
        assert client.post(MESSAGES, json=body).status_code == 200
        request = engine.requests[-1]
        params = request["params"]
        assert (params.max_tokens, params.temperature, params.top_p, params.top_k) == (7, 0.5, 0.9, 3)
        assert (params.stop, request["routing"], request["cache_salt"]) == (("a",), "exact", "s")
        choices = [({"type": "any"}, True), ({"type": "tool", "name": "g"}, True), ({"type": "none"}, False)]
        for choice, forced in choices:
            asked = {"messages": HELLO, "max_tokens": 7, "tools": TOOLS, "tool_choice": choice}
            assert client.post(MESSAGES, json=asked).status_code == 200
            wanted = engine.requests[-1]["params"].structured_outputs
            assert isinstance(wanted, StructuredOutputsParams) == forced
            assert not forced or ("city" in (wanted.grammar or "")) == (choice["type"] == "any")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"max_tokens": None}, "max_tokens is null"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"messages": []}, "messages has 0 elements"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 7}]}, "messages[0].content is 7"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content has 0 elements; expected at least 1"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "messages[0].content[0].type is 'image'; expected",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0] is a text block"),
        ({"messages": [{"role": "user", "content": [{"type": "thinking", "thinking": "x"}]}]}, "thinking block"),
        ({"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "x"}]}]}, "without name and input"),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "tool_result", "tool_use_id": "x"}]}]},
            "tool_result",
        ),
        ({"system": 7}, "system is 7"),
        ({"stop_sequences": "x"}, "stop_sequences is a string"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema is missing"),
        ({"tools": [{"type": "web_search_20250305", "name": "web"}]}, "tools[0].type"),
        ({"tools": [{"name": "f", "input_schema": {"type": "array"}}]}, "tools[0].input_schema"),
        ({"tools": TOOLS + TOOLS}, "tools has two tools of the name 'f'"),
        ({"tool_choice": {"type": "any"}}, "there are no tools"),
        ({"tools": TOOLS, "tool_choice": {"type": "tool", "name": "h"}}, "tool_choice has 'h'"),
        ({"tools": TOOLS, "tool_choice": {"type": "tool"}}, "tool_choice has no name"),
        ({"temperature": 101}, "temperature is 101"),
        ({"max_tokens": 5000}, "maximum context length"),
    ],
)
def test_bad_requests_are_told_in_anthropics_shape(start_server: StartServer, body: Any, words: str) -> None:
    with start_server(ScriptedEngine("hi"), form=FORM) as client:
        response = client.post(MESSAGES, json={"messages": HELLO, "max_tokens": 5, **body})
    assert response.status_code == 400, response.text
    error = MessagesError.model_validate_json(response.text).error
    assert error.type == "invalid_request_error"
    assert words in error.message
    assert "\n" not in error.message


def test_other_errors_have_anthropics_types(start_server: StartServer) -> None:
    body = {"messages": HELLO, "max_tokens": 5}

    def told(response: httpx.Response) -> tuple[int, str]:
        return response.status_code, MessagesError.model_validate_json(response.text).error.type

    engine = ScriptedEngine("hi")
    with start_server(engine, api_keys=["secret"], max_unfinished=1) as client:
        assert told(client.post(MESSAGES, json=body)) == (401, "authentication_error")
        client.headers["x-api-key"] = "secret"
        assert client.post(MESSAGES, json=body).status_code == 200
        assert client.post(f"{MESSAGES}/", json=body).status_code == 200
        assert told(client.post(MESSAGES, json={**body, "model": "other"})) == (404, "not_found_error")
        assert told(client.get(MESSAGES)) == (405, "invalid_request_error")
        assert told(client.post(COUNT, content="x")) == (415, "invalid_request_error")
        assert told(client.post(f"{MESSAGES}/batches", json=body)) == (404, "not_found_error")
        engine.failures = [RuntimeError()]
        assert told(client.post(MESSAGES, json=body)) == (500, "api_error")
        engine.gate.clear()
        with client.stream("POST", MESSAGES, json={**body, "stream": True}) as waiting:
            assert told(client.post(MESSAGES, json=body)) == (503, "overloaded_error")
            engine.failures = [RuntimeError()]
            engine.gate.set()
            (event,) = waiting.read().decode().strip().split("\n\n")
        assert event.startswith("event: error\ndata: ")
        assert json.loads(event.partition("data: ")[2])["error"]["type"] == "api_error"


def test_a_silent_stream_is_pinged(start_server: StartServer) -> None:
    engine = ScriptedEngine("a")
    engine.gate.clear()
    with (
        start_server(engine, keep_alive=0.05) as client,
        client.stream("POST", MESSAGES, json={"messages": HELLO, "max_tokens": 5, "stream": True}) as response,
    ):
        lines = response.iter_lines()
        assert [next(lines) for _ in range(3)] == ["event: ping", 'data: {"type": "ping"}', ""]
        engine.gate.set()
        assert "event: message_stop" in list(lines)


def test_arguments_that_are_no_json_are_kept() -> None:
    assert as_object("") == {}
    assert as_object('{"a": [1, "b') == {"a": [1, "b"]}
    assert as_object('{"a": oops}') == {INVALID_JSON: '{"a": oops}'}
    assert as_object("[1]") == {INVALID_JSON: "[1]"}
