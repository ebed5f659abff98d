"""OpenAI's Responses API: the same answers in its shapes, whole and as typed events, and what is kept of them."""

import json
from typing import Any

import httpx
import openai.types.responses as sdk
import pytest
from pydantic import TypeAdapter

from emoe_jax.requests.structured_params import StructuredOutputsParams
from serve.errors import ErrorResponse
from serve.parsing.forms import AnswerForm
from serve.responses.answers import ResponsesAnswer
from tests.serve.conftest import StartServer
from tests.serve.fake import FakeEngine, FakeTokenizer
from tests.serve.scripted import ScriptedEngine

RESPONSES = "/v1/responses"
FORM = AnswerForm("think", "hermes")
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [{"type": "function", "name": "f", "description": "It does f.", "parameters": CITY}]
TOOLS += [{"type": "function", "name": "g"}]
F = '<tool_call>{"name": "f", "arguments": {"city": "Oslo"}}</tool_call>'
G = '<tool_call>{"name": "g", "arguments": {}}</tool_call>'
EVENT: TypeAdapter[Any] = TypeAdapter(sdk.ResponseStreamEvent)


def events_of(client: httpx.Client, **body: Any) -> list[dict[str, Any]]:
    """All events, each of which repeats its name in its JSON and is one of OpenAI's, numbered from 0."""
    with client.stream("POST", RESPONSES, json={"stream": True, **body}) as response:
        assert response.status_code == 200, response.read()
        blocks = "".join(response.iter_text()).strip().split("\n\n")
    events = []
    for position, block in enumerate(blocks):
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
        assert events[-1]["sequence_number"] == position
        EVENT.validate_python(events[-1])
    return events


def assembled(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The items that the events put together. What is done has been begun, and says what its pieces said."""
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    assert all(event["response"]["status"] == "in_progress" for event in events[:2])
    items: dict[int, dict[str, Any]] = {}
    texts: dict[int, str] = {}
    done: dict[int, dict[str, Any]] = {}
    for event in events[2:-1]:
        at, kind = event["output_index"], event["type"].removeprefix("response.")
        assert at not in done
        if kind == "output_item.added":
            assert at == len(items)
            items[at], texts[at] = event["item"], ""
            assert event["item"]["status"] == "in_progress"
            continue
        if kind == "output_item.done":
            assert event["item"]["id"] == items[at]["id"]
            done[at] = event["item"]
            continue
        assert event["item_id"] == items[at]["id"]
        if kind.endswith(".delta"):
            texts[at] += event["delta"]
        elif kind in ("output_text.done", "reasoning_text.done"):
            assert event["text"] == texts[at]
        elif kind == "function_call_arguments.done":
            assert event["arguments"] == texts[at]
        elif kind == "content_part.done":
            assert event["part"]["text"] == texts[at]
        else:
            assert (kind, event["part"]["text"], texts[at]) == ("content_part.added", "", "")
    assert done.keys() == items.keys()
    for at, item in done.items():
        assert (item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"]) == texts[at]
    return [done[at] for at in sorted(done)]


def plain(item: dict[str, Any]) -> tuple[Any, ...]:
    """An item without its ids."""
    if item["type"] == "function_call":
        return "function_call", item["name"], item["arguments"], item["status"]
    return item["type"], item["content"][0]["text"], item["status"]


@pytest.mark.parametrize(
    ("says", "body", "output", "status", "thoughts"),
    [
        ("hello", {}, [("message", "hello", "completed")], "completed", 0),
        ("hello", {"max_output_tokens": 2}, [("message", "he", "incomplete")], "incomplete", 0),
        (
            "<think>2+2</think>4",
            {},
            [("reasoning", "2+2", "completed"), ("message", "4", "completed")],
            "completed",
            18,
        ),
        ("<think>2+2</think>4", {"max_output_tokens": 9}, [("reasoning", "2+", "incomplete")], "incomplete", 9),
        (
            f"Well: {F}{G} Done.",
            {"tools": TOOLS},
            [
                ("message", "Well:", "completed"),
                ("function_call", "f", '{"city": "Oslo"}', "completed"),
                ("function_call", "g", "{}", "completed"),
                ("message", " Done.", "completed"),
            ],
            "completed",
            0,
        ),
        (
            F,
            {"tools": TOOLS, "max_output_tokens": 50},
            [("function_call", "f", '{"city": "Os', "incomplete")],
            "incomplete",
            0,
        ),
        (F, {"tools": TOOLS, "tool_choice": "required", "max_output_tokens": 30}, [], "incomplete", 0),
        (
            f"{F}{G}",
            {"tools": TOOLS, "parallel_tool_calls": False},
            [("function_call", "f", '{"city": "Oslo"}', "completed")],
            "completed",
            0,
        ),
        ("", {}, [], "completed", 0),
    ],
)
def test_whole_and_streamed_alike(
    start_server: StartServer, says: str, body: dict[str, Any], output: list[Any], status: str, thoughts: int
) -> None:
    body = {"input": "hi", "metadata": {"a": "b"}, **body}
    with start_server(ScriptedEngine(says), form=FORM, max_model_len=1000) as client:
        response = client.post(RESPONSES, json=body)
        events = events_of(client, **body)
    assert response.status_code == 200, response.text
    answer, last = response.json(), events[-1]
    assert last["type"] == f"response.{status}"
    assert list(map(plain, assembled(events))) == output
    assert assembled(events) == last["response"]["output"]
    for each in (answer, last["response"]):
        ResponsesAnswer.model_validate(each)
        sdk.Response.model_validate(each)
        assert list(map(plain, each["output"])) == output
        assert (each["status"], each["object"], each["model"]) == (status, "response", "fake")
        assert each["incomplete_details"] == ({"reason": "max_output_tokens"} if status == "incomplete" else None)
        assert (each["error"], each["metadata"]) == (None, {"a": "b"})
        usage = each["usage"]
        assert usage["input_tokens"] == len("user:hi;assistant:") + (len("f();g();") if "tools" in body else 0)
        assert usage["input_tokens_details"]["cached_tokens"] == 1
        assert usage["output_tokens_details"]["reasoning_tokens"] == thoughts
        assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
        assert each["emoe"]["task"] == "conv"
    ids = [item["id"] for item in answer["output"]]
    assert len(set(ids)) == len(ids)
    assert answer["id"] != last["response"]["id"]


def test_text_streams_as_it_comes(start_server: StartServer) -> None:
    engine = ScriptedEngine("abc")
    engine.gate.clear()
    with (
        start_server(engine, keep_alive=0.05) as client,
        client.stream("POST", RESPONSES, json={"input": "hi", "stream": True}) as response,
    ):
        lines = response.iter_lines()
        assert [next(lines) for _ in range(6)][::3] == ["event: response.created", "event: response.in_progress"]
        assert next(lines) == ": keep-alive"
        engine.gate.set()
        deltas = [json.loads(line[6:]) for line in lines if line.startswith("data:") and "text.delta" in line]
    assert [event["delta"] for event in deltas] == ["a", "b", "c"]


def test_conversations_reach_the_template(start_server: StartServer) -> None:
    engine = ScriptedEngine("hi")
    with start_server(engine, form=FORM, max_model_len=1000) as client:

        def prompt(given: Any, **body: Any) -> str:
            answer = client.post(RESPONSES, json={"input": given, "max_output_tokens": 1, **body})
            assert answer.status_code == 200, answer.text
            return FakeTokenizer().decode(engine.requests[-1]["prompt"])

        user = {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]}
        assert prompt("hi", instructions="be kind") == "system:be kind;user:hi;assistant:"
        assert prompt([{"type": "message", **user}]) == "user:a\nb;assistant:"
        said = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I look."}]}
        refused = {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}
        thought = {
            "type": "reasoning",
            "id": "rs_1",
            "summary": [],
            "content": [{"type": "reasoning_text", "text": "?"}],
        }
        call = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"city": "Oslo"}'}
        broken = {"type": "function_call", "call_id": "c2", "name": "f", "arguments": "no JSON"}
        results = [{"type": "function_call_output", "call_id": each, "output": "7"} for each in ("c1", "c2")]
        history = [{"role": "developer", "content": "be kind"}, user, thought, said, call, broken, *results, user]
        told = "developer:be kind;user:a\nb;assistant:I look.;tool:7;tool:7;user:a\nb;assistant:"
        assert prompt(history) == told
        assert prompt([user, said, refused]) == "user:a\nb;assistant:I look.;assistant:no;assistant:"
        assert prompt("hi", reasoning={"effort": "none"}) == "enable_thinking=False;user:hi;assistant:"
        assert prompt("hi", reasoning={"effort": "xhigh"}, chat_template_kwargs={"x": 1}) == (
            "enable_thinking=True;reasoning_effort=high;x=1;user:hi;assistant:"
        )


def test_what_becomes_of_a_request(start_server: StartServer) -> None:
    engine = ScriptedEngine("hi")
    body = {"input": "hi", "max_output_tokens": 7, "temperature": 0.5, "top_p": 0.9, "top_k": 3, "seed": 4}
    body |= {"emoe": {"routing": "exact", "slo": {"ttft_ms": 50}}, "cache_salt": "s", "user": "u", "ignore_eos": True}
    body |= {"include": ["reasoning.encrypted_content"], "truncation": "disabled", "service_tier": "auto"}
    body |= {"presence_penalty": 0.25, "frequency_penalty": -0.5, "logit_bias": {"7": 100}, "stop": [], "n": 1}
    with start_server(engine, form=FORM) as client:
        answer = client.post(RESPONSES, json=body)
        assert answer.status_code == 200, answer.text
        request = engine.requests[-1]
        params = request["params"]
        assert (params.max_tokens, params.temperature, params.top_p, params.top_k) == (7, 0.5, 0.9, 3)
        assert (params.seed, params.ignore_eos, request["routing"], request["cache_salt"]) == (4, True, "exact", "s")
        assert (params.presence_penalty, params.frequency_penalty, params.logit_bias) == (0.25, -0.5, {7: 100})
        assert request["slo"].ttft_ms == 50
        assert (answer.json()["temperature"], answer.json()["top_p"]) == (0.5, 0.9)
        for choice, forced in (("required", True), ({"type": "function", "name": "g"}, True), ("none", False)):
            answer = client.post(RESPONSES, json={"input": "hi", "tools": TOOLS, "tool_choice": choice})
            assert answer.json()["tool_choice"] == choice
            wanted = engine.requests[-1]["params"].structured_outputs
            assert isinstance(wanted, StructuredOutputsParams) == forced
        form = {"type": "json_schema", "name": "city", "schema": CITY, "strict": True}
        answer = client.post(RESPONSES, json={"input": "hi", "text": {"format": form}})
        assert answer.json()["text"] == {"format": form}
        assert json.loads(engine.requests[-1]["params"].structured_outputs.json) == CITY


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"input": None}, "input", "expected a list"),
        ({"input": []}, "input", "at least 1"),
        ({"input": [{"role": "user"}]}, "input[0]", "is a message item without content"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type", "input_text"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role", "'user'"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type", "'function_call_output'"),
        ({"input": [{"type": "function_call"}]}, "input[0]", "without call_id and name and arguments"),
        (
            {"input": [{"type": "function_call_output", "call_id": "x", "output": "y"}]},
            "input[0].call_id",
            "no function_call before it",
        ),
        ({"tools": [{"type": "web_search_preview"}]}, "tools[0].type", "runs no tools itself; expected 'function'"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name", "other characters"),
        ({"tools": TOOLS * 2}, "tools[2].name", "as is that of another tool"),
        ({"tools": TOOLS, "tool_choice": {"type": "file_search"}}, "tool_choice", "'file_search'; expected"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "h"}}, "tool_choice", "'h', which is none"),
        ({"tool_choice": "required"}, "tool_choice", "there are no tools"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema", "needs schema"),
        ({"tools": TOOLS, "text": {"format": {"type": "json_object"}}}, "text.format", "give tools or text.format"),
        ({"background": True}, "background", "not supported"),
        ({"stop": "x"}, "stop", "not supported"),
        ({"n": 2}, "n", "not supported"),
        ({"logit_bias": {"x": 1}}, "logit_bias", ""),
        ({"conversation": "conv_1"}, "conversation", "not supported"),
        ({"truncation": "auto"}, "truncation", "not supported"),
        ({"include": ["message.output_text.logprobs"]}, "include", "not supported"),
        ({"metadata": {str(i): "" for i in range(17)}}, "metadata", "at most 16"),
        ({"max_output_tokens": 5000}, "max_output_tokens", "max_output_tokens = 5000 exceed"),
        ({"input": "x" * 2000}, "input", "maximum context length"),
        ({"previous_response_id": "resp_x"}, "previous_response_id", "'resp_x'"),
        ({"emoe": {"routing": "x"}}, "emoe.routing", "'exact'"),
    ],
)
def test_bad_requests_name_the_field(start_server: StartServer, body: Any, param: str, words: str) -> None:
    with start_server(ScriptedEngine("hi"), form=FORM, max_model_len=1000) as client:
        response = client.post(RESPONSES, json={"input": "hi", **body})
    assert response.status_code == 400, response.text
    error = ErrorResponse.model_validate_json(response.text).error
    assert (error.param, error.type) == (param, "invalid_request_error")
    assert words in error.message
    assert "\n" not in error.message


def test_failures_are_told(start_server: StartServer) -> None:
    engine = ScriptedEngine("hi")
    with start_server(engine, max_unfinished=1) as client:
        engine.failures = [RuntimeError()]
        assert client.post(RESPONSES, json={"input": "hi"}).status_code == 500
        engine.gate.clear()
        with client.stream("POST", RESPONSES, json={"input": "hi", "stream": True}) as waiting:
            assert client.post(RESPONSES, json={"input": "hi"}).status_code == 503
            engine.failures = [RuntimeError()]
            engine.gate.set()
            *_, name, data = waiting.read().decode().strip().split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert (name, event["response"]["status"]) == ("event: response.failed", "failed")
        assert event["response"]["error"]["code"] == "server_error"
        sdk.ResponseFailedEvent.model_validate(event)
        assert client.get(f"{RESPONSES}/{event['response']['id']}").status_code == 404


class Remembering(ScriptedEngine):
    """Says how many messages its prompt has."""

    def add_request(self, request_id: str, prompt: Any, *args: Any, **kwargs: Any) -> list[int]:
        self.says = f"{FakeTokenizer().decode(prompt).count(';')}"
        return super().add_request(request_id, prompt, *args, **kwargs)


def told(engine: FakeEngine) -> str:
    return FakeTokenizer().decode(engine.requests[-1]["prompt"])


@pytest.mark.parametrize("stream", [False, True])
def test_a_response_may_go_on_from_another(start_server: StartServer, stream: bool) -> None:
    engine = Remembering("")
    with start_server(engine, form=FORM, max_model_len=1000) as client:

        def ask(given: Any, **body: Any) -> dict[str, Any]:
            body = {"input": given, **body}
            return events_of(client, **body)[-1]["response"] if stream else client.post(RESPONSES, json=body).json()

        first = ask("a", instructions="be kind")
        second = ask("b", previous_response_id=first["id"])
        assert told(engine) == "user:a;assistant:2;user:b;assistant:"  # OpenAI carries no instructions over, either
        third = ask("c", previous_response_id=second["id"], instructions="be brief")
        assert told(engine) == "system:be brief;user:a;assistant:2;user:b;assistant:3;user:c;assistant:"
        assert third["previous_response_id"] == second["id"]
        assert client.get(f"{RESPONSES}/{third['id']}").json() == third
        assert client.delete(f"{RESPONSES}/{second['id']}").json()["deleted"]
        assert client.delete(f"{RESPONSES}/{second['id']}").status_code == 404
        ask("d", previous_response_id=third["id"])  # which has all that it needs
        assert told(engine).startswith("user:a;assistant:2;user:b;assistant:3;user:c;assistant:6;user:d;")
        lost = client.post(RESPONSES, json={"input": "e", "previous_response_id": second["id"]})
        assert (lost.status_code, lost.json()["error"]["code"]) == (400, "previous_response_not_found")
        unstored = ask("f", store=False)
        assert client.get(f"{RESPONSES}/{unstored['id']}").status_code == 404
        cancelled = client.post(f"{RESPONSES}/{third['id']}/cancel")
        assert (cancelled.status_code, "background" in cancelled.text) == (400, True)
        assert client.get(f"{RESPONSES}/{third['id']}", params={"stream": True}).status_code == 400


def test_input_items_are_listed_page_by_page(start_server: StartServer) -> None:
    call = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"}
    result = {"type": "function_call_output", "call_id": "c1", "output": "7"}
    thought = {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "so"}]}
    said = {"role": "assistant", "content": "ok"}
    with start_server(Remembering(""), form=FORM, max_model_len=1000) as client:
        given = [{"role": "user", "content": "a"}, thought, call, result, said, {"role": "user", "content": "b"}]
        answer = client.post(RESPONSES, json={"input": given}).json()
        path = f"{RESPONSES}/{answer['id']}/input_items"
        listed = client.get(path, params={"order": "asc"}).json()
        item: TypeAdapter[Any] = TypeAdapter(sdk.ResponseItem)
        for each in listed["data"]:
            item.validate_python(each)
        kinds = [each["type"] for each in listed["data"]]
        assert kinds == ["message", "reasoning", "function_call", "function_call_output", "message", "message"]
        assert listed["data"][0]["content"] == [{"type": "input_text", "text": "a"}]
        assert listed["data"][3]["output"] == "7"
        assert listed["data"][4]["content"][0]["type"] == "output_text"
        page = client.get(path, params={"limit": 4}).json()
        rest = client.get(path, params={"limit": 4, "after": page["last_id"]}).json()
        assert [*page["data"], *rest["data"]] == listed["data"][::-1]
        assert (page["has_more"], rest["has_more"], rest["last_id"]) == (True, False, listed["first_id"])
        for wrong, message in (
            ({"after": "x"}, "after is the id of none of the items"),
            ({"limit": 0}, "limit is '0'; expected an integer from 1 to 100"),
            ({"limit": 1000}, "limit is '1000'; expected an integer from 1 to 100"),
            ({"limit": "x"}, "limit is 'x'; expected an integer from 1 to 100"),
            ({"order": "up"}, "order is 'up'; expected 'asc' or 'desc'"),
        ):
            refused = client.get(path, params=wrong)
            assert (refused.status_code, refused.json()["error"]["message"]) == (400, message)
        assert client.get(f"{RESPONSES}/resp_x/input_items").status_code == 404
        # What was listed is input again.
        assert client.post(RESPONSES, json={"input": listed["data"]}).status_code == 200


def test_a_response_belongs_to_its_key(start_server: StartServer) -> None:
    with start_server(Remembering(""), api_keys=["one", "two"], max_model_len=1000) as client:
        client.headers["authorization"] = "Bearer one"
        first = client.post(RESPONSES, json={"input": "a"}).json()
        assert client.get(f"{RESPONSES}/{first['id']}").status_code == 200
        client.headers["authorization"] = "Bearer two"
        assert client.get(f"{RESPONSES}/{first['id']}").status_code == 404
        assert client.delete(f"{RESPONSES}/{first['id']}").status_code == 404
        other = client.post(RESPONSES, json={"input": "b", "previous_response_id": first["id"]})
        assert other.status_code == 400
