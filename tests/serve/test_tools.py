"""Tools on the wire: what the model is told of them, and its calls, whole and streamed."""

import json
from typing import Any

import httpx
import pytest

from emoe_jax.requests.structured_params import StructuredOutputsParams
from serve.answers import ChatChunk, ChatResponse
from serve.parsing.forms import AnswerForm
from tests.serve.conftest import StartServer
from tests.serve.events import events_of
from tests.serve.fake import FakeTokenizer
from tests.serve.scripted import ScriptedEngine

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hi"}]
HERMES = AnswerForm("think", "hermes")
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "f", "description": "It does f.", "parameters": CITY}},
    {"type": "function", "function": {"name": "g"}},
]
F = '<tool_call>{"name": "f", "arguments": {"city": "Oslo"}}</tool_call>'
G = '<tool_call>{"name": "g", "arguments": {}}</tool_call>'
NAMED = {"type": "function", "function": {"name": "g"}}


def tool(name: str = "f", **function: Any) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": name, **function}}]


def streamed(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The message and finish reason that the chunks of one answer put together."""
    content, reasoning, calls, reason = "", "", list[dict[str, Any]](), None
    for event in events:
        ChatChunk.model_validate(event)
        for choice in event["choices"]:
            delta, reason = choice["delta"], choice["finish_reason"] or reason
            content += delta.get("content") or ""
            reasoning += delta.get("reasoning_content") or ""
            for call in delta.get("tool_calls") or ():
                if "id" in call:
                    assert call["index"] == len(calls)
                    assert (call["type"], call["function"]["arguments"]) == ("function", "")
                    calls.append({"name": call["function"]["name"], "arguments": ""})
                else:
                    assert call.keys() == {"index", "function"}
                    calls[call["index"]]["arguments"] += call["function"]["arguments"]
    return {"content": content, "reasoning": reasoning, "calls": calls, "reason": reason}


@pytest.mark.parametrize(
    ("says", "body", "content", "calls", "reason"),
    [
        ("hello", {}, "hello", [], "stop"),
        (F, {}, "", [("f", {"city": "Oslo"})], "tool_calls"),
        (f"Well:\n{F}\n{G}", {}, "Well:", [("f", {"city": "Oslo"}), ("g", {})], "tool_calls"),
        (f"{F}{G}", {"parallel_tool_calls": False}, "", [("f", {"city": "Oslo"})], "tool_calls"),
        (F, {"tool_choice": "none"}, F, [], "stop"),
        (F, {"tools": tool("other")}, F, [], "stop"),
        ("<tool_call>{oops}</tool_call>", {}, "<tool_call>{oops}</tool_call>", [], "stop"),
        (f"<think>a {G}</think>{F}", {}, "", [("f", {"city": "Oslo"})], "tool_calls"),
        (F, {"stop": "}}</"}, "", [("f", '{"city": "Oslo"')], "tool_calls"),
        (F, {"max_tokens": 50}, "", [("f", '{"city": "Os')], "length"),
    ],
)
def test_whole_and_streamed_alike(
    start_server: StartServer, says: str, body: dict[str, Any], content: str, calls: list[Any], reason: str
) -> None:
    body = {"messages": HELLO, "tools": TOOLS, **body}
    with start_server(ScriptedEngine(says), form=HERMES, max_model_len=1000) as client:
        response = client.post(CHAT, json=body)
        events = events_of(client, CHAT, **body, stream=True)
    assert response.status_code == 200, response.text
    ChatResponse.model_validate_json(response.text)
    (choice,) = response.json()["choices"]
    message = choice["message"]
    assert message["content"] == (content or None if calls else content)
    assert choice["finish_reason"] == reason
    whole = [each["function"] for each in message.get("tool_calls", [])]
    arguments = [each["arguments"] for each in whole]
    assert [each["name"] for each in whole] == [name for name, _ in calls]
    for written, (_, expected) in zip(arguments, calls, strict=True):
        assert (written if isinstance(expected, str) else json.loads(written)) == expected
    answer = streamed(events)
    assert (answer["content"], answer["calls"], answer["reason"]) == (content, whole, reason)
    assert answer["reasoning"] == (message.get("reasoning_content") or "")


def test_arguments_stream_as_they_come(start_server: StartServer) -> None:
    with start_server(ScriptedEngine(F), form=HERMES, max_model_len=1000) as client:
        events = events_of(client, CHAT, messages=HELLO, tools=TOOLS, stream=True)
    calls = [call for event in events for call in event["choices"][0]["delta"].get("tool_calls") or ()]
    pieces = [call["function"]["arguments"] for call in calls]
    assert pieces == ["", '{"', *'city": "Oslo"}']


def test_ids_differ_and_suit_the_templates_that_check_them(start_server: StartServer) -> None:
    with start_server(ScriptedEngine(F + G), form=HERMES, max_model_len=1000) as client:
        answer = client.post(CHAT, json={"messages": HELLO, "tools": TOOLS, "n": 2}).json()
    ids = [call["id"] for choice in answer["choices"] for call in choice["message"]["tool_calls"]]
    assert len(set(ids)) == 4
    assert all(len(each) == 9 and each.isalnum() for each in ids)


def prompt_of(client: httpx.Client, **body: Any) -> str:
    answer = client.post("/tokenize", json={"messages": HELLO, **body})
    assert answer.status_code == 200, answer.text
    return FakeTokenizer().decode(answer.json()["tokens"])


def test_the_template_gets_tools_and_calls(start_server: StartServer) -> None:
    engine = ScriptedEngine("hi")
    with start_server(engine, form=HERMES, max_model_len=1000) as client:
        assert prompt_of(client, tools=TOOLS) == "f();g();user:hi;assistant:"
        for choice, told in (("auto", "f();g();"), ("none", ""), ("required", "f();g();"), (NAMED, "f();g();")):
            response = client.post(CHAT, json={"messages": HELLO, "tools": TOOLS, "tool_choice": choice})
            assert response.status_code == 200, response.text
            assert FakeTokenizer().decode(engine.requests[-1]["prompt"]) == f"{told}user:hi;assistant:"
        called = {"id": "c1", "type": "function", "function": {"name": "g", "arguments": ""}}
        history = [
            *HELLO,
            {"role": "assistant", "content": None, "tool_calls": [called]},
            {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "7"}]},
        ]
        assert prompt_of(client, messages=history) == "user:hi;assistant:;tool:7;assistant:"


@pytest.mark.parametrize(
    ("form", "body", "words"),
    [
        (HERMES, {}, None),
        (HERMES, {"tool_choice": "none"}, None),
        (HERMES, {"tool_choice": "required"}, ["<tool_call>", '\\"f\\"', '\\"g\\"', '"required": ["city"]']),
        (HERMES, {"tool_choice": NAMED}, ["<tool_call>", '\\"g\\"']),
        (AnswerForm(), {"tool_choice": "required"}, ["<tool_call>"]),
        (AnswerForm("none", "qwen-xml"), {"tool_choice": "required"}, ["<tool_call>"]),
        (AnswerForm("none", "mistral"), {"tool_choice": "required"}, ["[TOOL_CALLS]"]),
        (AnswerForm("harmony", "harmony"), {"tool_choice": "required"}, ["to=functions.f"]),
        (HERMES, {"tools": tool(parameters=CITY, strict=True)}, ["begin", '"required": ["city"]']),
        (HERMES, {"tools": tool(parameters=CITY, strict=False)}, None),
    ],
)
def test_calls_that_have_to_fit_are_held_to_a_grammar(
    start_server: StartServer, form: AnswerForm, body: dict[str, Any], words: list[str] | None
) -> None:
    engine = ScriptedEngine("hi")
    with start_server(engine, form=form, max_model_len=1000) as client:
        response = client.post(CHAT, json={"messages": HELLO, "tools": TOOLS, **body})
    assert response.status_code == 200, response.text
    wanted = engine.requests[0]["params"].structured_outputs
    if words is None:
        assert wanted is None
    else:
        assert isinstance(wanted, StructuredOutputsParams)
        grammar = wanted.grammar or ""
        assert [word for word in words if word not in grammar] == []
        assert ("city" in grammar) == (body.get("tool_choice") != NAMED)


def test_only_strict_functions_are_held_to_their_schemas_where_nothing_has_to_be_called(
    start_server: StartServer,
) -> None:
    engine = ScriptedEngine("hi")
    both = tool(parameters=CITY, strict=True) + tool("loose", parameters={"required": ["town"]})
    with start_server(engine, form=HERMES, max_model_len=1000) as client:
        for choice in ("auto", "required"):
            client.post(CHAT, json={"messages": HELLO, "tools": both, "tool_choice": choice})
    grammars = [request["params"].structured_outputs.grammar for request in engine.requests]
    assert [("city" in grammar, "town" in grammar, "loose" in grammar) for grammar in grammars] == [
        (True, False, True),
        (True, True, True),
    ]


@pytest.mark.parametrize(("tokens", "arguments"), [(1, None), (11, None), (30, None), (50, '{"city": "Os')])
def test_a_forced_call_that_is_cut_says_no_markup(
    start_server: StartServer, tokens: int, arguments: str | None
) -> None:
    body = {"messages": HELLO, "tools": TOOLS, "tool_choice": "required", "max_tokens": tokens}
    with start_server(ScriptedEngine(F), form=HERMES, max_model_len=1000) as client:
        (choice,) = client.post(CHAT, json=body).json()["choices"]
        events = events_of(client, CHAT, **body, stream=True)
        free = client.post(CHAT, json={**body, "tool_choice": "auto"}).json()["choices"][0]["message"]
    calls = choice["message"].get("tool_calls") or []
    assert [call["function"]["arguments"] for call in calls] == ([] if arguments is None else [arguments])
    assert (choice["message"]["content"] or "", choice["finish_reason"]) == ("", "length")
    assert not any(choice["delta"].get("content") for event in events for choice in event["choices"])
    assert bool(free["content"]) == (arguments is None)


def test_a_forced_call_is_read_whatever_the_models_own_form_is(start_server: StartServer) -> None:
    for form in (AnswerForm(), AnswerForm("none", "qwen-xml"), HERMES):
        with start_server(ScriptedEngine(F), form=form, max_model_len=1000) as client:
            body = {"messages": HELLO, "tools": TOOLS, "tool_choice": "required"}
            (choice,) = client.post(CHAT, json=body).json()["choices"]
        assert choice["message"]["tool_calls"][0]["function"] == {"name": "f", "arguments": '{"city": "Oslo"}'}
        assert choice["finish_reason"] == "tool_calls"


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"tools": [{"type": "function"}]}, "tools[0].function", "is missing"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name", "is missing"),
        ({"tools": [{"type": "retrieval"}]}, "tools[0].type", "expected 'function'"),
        ({"tools": tool("")}, "tools[0].function.name", "at least 1"),
        ({"tools": tool("a b")}, "tools[0].function.name", "other characters"),
        ({"tools": tool("x" * 129)}, "tools[0].function.name", "at most 128"),
        ({"tools": tool() + tool()}, "tools[1].function.name", "'f', as is that of another"),
        ({"tools": tool(parameters=[])}, "tools[0].function.parameters", "a JSON schema of an object"),
        ({"tools": tool(parameters={"type": "string"})}, "tools[0].function.parameters", 'another type than "object"'),
        ({"tools": tool(parameters={"properties": {"x": 5}})}, "tools[0].function.parameters", "no schemas by name"),
        ({"tools": tool(parameters={"required": "x"})}, "tools[0].function.parameters", "no list of names"),
        ({"tools": tool(strict="yes")}, "tools[0].function.strict", "true or false"),
        ({"tools": {}}, "tools", "a list"),
        ({"tools": tool() * 600}, "tools", "at most 512"),
        ({"tool_choice": "required"}, "tool_choice", "there are no tools"),
        ({"tool_choice": NAMED}, "tool_choice", "there are no tools"),
        ({"tools": TOOLS, "tool_choice": "some"}, "tool_choice", "expected"),
        ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice", "expected"),
        ({"tools": tool(), "tool_choice": NAMED}, "tool_choice", "'g', which is none of the tools"),
        ({"tools": TOOLS, "parallel_tool_calls": 1}, "parallel_tool_calls", "true or false"),
        ({"tools": TOOLS, "response_format": {"type": "json_object"}}, "response_format", "no room for calls"),
        (
            {"tools": TOOLS + tool("odd", parameters={"oneOf": [{}, {}]}), "tool_choice": "required"},
            "tools[2].function.parameters",
            "tools[2].function.parameters of 'odd' cannot be used: ",
        ),
    ],
)
def test_bad_tools_are_refused(start_server: StartServer, body: dict[str, Any], param: str, words: str) -> None:
    with start_server(ScriptedEngine("hi"), form=HERMES, max_model_len=1000) as client:
        response = client.post(CHAT, json={"messages": HELLO, **body})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert words in error["message"]
    assert param.split("[")[0] in error["message"]


@pytest.mark.parametrize(
    ("message", "param", "words"),
    [
        (
            {"role": "user", "content": "x", "tool_calls": [{"function": {"name": "f"}}]},
            "messages[0]",
            "only an assistant",
        ),
        ({"role": "assistant", "tool_calls": [{"function": {}}]}, "messages[0].tool_calls[0].function.name", "missing"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
            "messages[0].tool_calls[0].function.arguments",
            "no JSON",
        ),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[]"}}]},
            "messages[0].tool_calls[0].function.arguments",
            "no object",
        ),
        ({"role": "assistant", "function_call": {"name": "f"}}, "messages[0]", "function_call"),
    ],
)
def test_bad_calls_of_the_past_are_refused(client: httpx.Client, message: Any, param: str, words: str) -> None:
    response = client.post(CHAT, json={"messages": [message]})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    assert words in response.json()["error"]["message"]


class Unaware(FakeTokenizer):
    shows_tools = False


def test_tools_that_the_template_does_not_show_are_refused(start_server: StartServer) -> None:
    """Unless a grammar makes the model call: then the call comes whether the model has seen the tool or not."""
    function, own = TOOLS[0]["function"], {"max_tokens": 20}
    with start_server(ScriptedEngine(F, Unaware()), form=HERMES, max_model_len=1000) as client:
        for path, body in (
            (CHAT, {"messages": HELLO, "tools": TOOLS}),
            ("/v1/responses", {"input": "hi", "tools": [{"type": "function", **function}]}),
            ("/v1/messages", {"messages": HELLO, "tools": [{"name": "f", "input_schema": {"type": "object"}}], **own}),
        ):
            response = client.post(path, json=body)
            assert response.status_code == 400, response.text
            assert "the chat template of this model does not show it the tools" in response.json()["error"]["message"]
        assert client.post(CHAT, json={"messages": HELLO, "tools": TOOLS, "tool_choice": "none"}).status_code == 200
        assert client.post(CHAT, json={"messages": HELLO, "tools": TOOLS, "tool_choice": "required"}).status_code == 200


def test_tools_need_a_form_of_calls(client: httpx.Client) -> None:
    response = client.post(CHAT, json={"messages": HELLO, "tools": TOOLS})
    assert response.status_code == 400
    assert "--tool-call-parser" in response.json()["error"]["message"]
    assert response.json()["error"]["param"] == "tools"
    assert client.post(CHAT, json={"messages": HELLO, "tools": TOOLS, "tool_choice": "none"}).status_code == 200
    assert client.post(CHAT, json={"messages": HELLO, "tools": []}).status_code == 200
