"""Thoughts on the wire: `reasoning_content` beside the answer, whole and streamed."""

from types import SimpleNamespace
from typing import Any

import pytest

from emoe_jax.models import families
from serve.answers import ChatChunk, ChatResponse
from serve.options import ServerOptions
from serve.parsing.forms import AnswerForm
from serve.start import answer_form
from tests.serve.conftest import StartServer
from tests.serve.events import events_of
from tests.serve.scripted import ScriptedEngine, Tagging

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hi"}]
THINK = AnswerForm("think")
THOUGHT = "<think>2+2</think>4"


def streamed(events: list[dict[str, Any]], field: str) -> str:
    choices = [choice for event in events for choice in event["choices"]]
    return "".join(choice["delta"].get(field) or "" for choice in choices)


@pytest.mark.parametrize(
    ("says", "form", "body", "reasoning", "content", "reason", "tokens"),
    [
        (THOUGHT, THINK, {}, "2+2", "4", "stop", 18),
        (THOUGHT, AnswerForm(), {}, None, THOUGHT, "stop", None),
        ("4", THINK, {}, None, "4", "stop", 0),
        (THOUGHT, THINK, {"max_tokens": 9}, "2+", "", "length", 9),
        (THOUGHT, THINK, {"stop": "+"}, "2", "", "stop", None),
        (THOUGHT, THINK, {"stop": ["4", "</th"]}, "2+2", "", "stop", None),
        (THOUGHT, THINK, {"response_format": {"type": "json_object"}}, None, THOUGHT, "stop", None),
        ("<|channel|>final<|message|>4", AnswerForm("harmony"), {}, None, "4", "stop", 0),
        ("<|channel|>analysis<|message|>2+2<|end|>", AnswerForm("harmony"), {}, "2+2", "", "stop", 40),
    ],
)
def test_whole_and_streamed_alike(
    start_server: StartServer,
    says: str,
    form: AnswerForm,
    body: dict[str, Any],
    reasoning: str | None,
    content: str,
    reason: str,
    tokens: int | None,
) -> None:
    body = {"messages": HELLO, **body}
    with start_server(ScriptedEngine(says), form=form) as client:
        response = client.post(CHAT, json=body)
        events = events_of(client, CHAT, **body, stream=True, stream_options={"include_usage": True})
    assert response.status_code == 200, response.text
    ChatResponse.model_validate_json(response.text)
    answer = response.json()
    (choice,) = answer["choices"]
    assert choice["message"].get("reasoning_content") == reasoning
    assert (choice["message"]["content"], choice["finish_reason"]) == (content, reason)
    for event in events:
        ChatChunk.model_validate(event)
    assert streamed(events, "reasoning_content") == (reasoning or "")
    assert streamed(events, "content") == content
    reasons = [choice["finish_reason"] for event in events for choice in event["choices"]]
    assert [each for each in reasons if each] == [reason]
    for usage in (answer["usage"], events[-1]["usage"]):
        details = usage.get("completion_tokens_details")
        assert details == (None if tokens is None else {"reasoning_tokens": tokens})


def test_thoughts_stream_as_they_come(start_server: StartServer) -> None:
    with start_server(ScriptedEngine(THOUGHT), form=THINK) as client:
        events = events_of(client, CHAT, messages=HELLO, stream=True)
    deltas = [choice["delta"] for event in events for choice in event["choices"]]
    assert deltas[0] == {"role": "assistant", "content": ""}
    thoughts = [delta["reasoning_content"] for delta in deltas if "reasoning_content" in delta]
    assert thoughts == ["2", "+", "2"]
    assert not any("content" in delta and "reasoning_content" in delta for delta in deltas)


def test_a_prompt_may_have_begun_the_thoughts(start_server: StartServer) -> None:
    with start_server(ScriptedEngine("2+2</think>4"), form=THINK) as client:

        def message(**body: Any) -> dict[str, Any]:
            return client.post(CHAT, json={"messages": HELLO, **body}).json()["choices"][0]["message"]

        assert "reasoning_content" not in message()
        begun = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "<think>1 +"}]
        continued = message(messages=begun, continue_final_message=True)
        assert (continued["reasoning_content"], continued["content"]) == ("2+2", "4")
        ended = message(messages=[{"role": "user", "content": "<think>\n"}], add_generation_prompt=False)
        assert ended["content"] == "2+2</think>4"  # the template writes a mark behind it
        open_thought = [{"role": "user", "content": "<think>a</think>"}]
        assert "reasoning_content" not in message(messages=open_thought, continue_final_message=True)


def test_a_template_may_begin_the_thoughts(start_server: StartServer) -> None:
    engine = ScriptedEngine("2+2</think>4", Tagging({}, "<think>\n"))
    with start_server(engine, form=THINK) as client:
        message = client.post(CHAT, json={"messages": HELLO}).json()["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("2+2", "4")


def test_tags_that_are_special_tokens_are_shown_to_the_parser_and_may_end_answers(start_server: StartServer) -> None:
    engine = ScriptedEngine("hi", Tagging({"<|channel|>": 5, "<|call|>": 6, "<think>": 7}))
    with start_server(engine, form=AnswerForm("harmony")) as client:
        most = list(range(9, 25))
        for body in ({"stop_token_ids": most}, {"response_format": {"type": "json_object"}}):
            assert client.post(CHAT, json={"messages": HELLO, **body}).status_code == 200
        client.post("/v1/completions", json={"prompt": "hi"})
    shown = [request["params"].shown_token_ids for request in engine.requests]
    assert shown == [(5, 6), (), ()]
    assert [request["params"].stop_token_ids for request in engine.requests] == [tuple(most), (), ()]
    assert [request["params"].ending_token_ids for request in engine.requests] == [(6,), (), ()]


def test_answers_of_a_request_are_told_apart_one_by_one(start_server: StartServer) -> None:
    with start_server(ScriptedEngine(THOUGHT), form=THINK) as client:
        answer = client.post(CHAT, json={"messages": HELLO, "n": 3}).json()
    messages = [choice["message"] for choice in answer["choices"]]
    assert [(each["reasoning_content"], each["content"]) for each in messages] == [("2+2", "4")] * 3
    assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": 54}


def test_completions_have_the_text_as_it_is(start_server: StartServer) -> None:
    with start_server(ScriptedEngine(THOUGHT), form=THINK) as client:
        answer = client.post("/v1/completions", json={"prompt": "hi", "max_tokens": 30}).json()
    assert answer["choices"][0]["text"] == THOUGHT


def test_families_name_forms_that_there_are() -> None:
    forms = {family.name: (family.reasoning, family.calls) for family in families()}
    assert forms["gpt_oss"] == ("harmony", "harmony")
    assert forms["qwen3_moe"] == ("think", None)
    assert forms["glm4_moe"] == ("think", "glm")
    for reasoning, calls in forms.values():
        assert reasoning is None or ServerOptions(reasoning_parser=reasoning)  # pyright: ignore[reportArgumentType]
        assert calls is None or ServerOptions(tool_call_parser=calls)  # pyright: ignore[reportArgumentType]


def test_options_win_over_the_family_and_the_template() -> None:
    class Model:
        """An engine, as far as its form goes."""

        def __init__(self, family: str, template: str):
            self.config = SimpleNamespace(family=family)
            self.tokenizer = SimpleNamespace(template_writes=lambda text: text in template)

    def form(model: Any, **options: Any) -> AnswerForm:
        return answer_form(ServerOptions(**options), model)

    qwen = Model("qwen3_moe", "<think></think><tool_call>")
    assert form(qwen) == AnswerForm("think", "hermes")
    assert form(qwen, reasoning_parser="none", tool_call_parser="qwen-xml") == AnswerForm("none", "qwen-xml")
    assert form(Model("gpt_oss", "")) == AnswerForm("harmony", "harmony")
    assert form(Model("mixtral", "[TOOL_CALLS]")) == AnswerForm("none", "mistral")
    assert form(SimpleNamespace(config=SimpleNamespace(family="mixtral"), tokenizer=None)) == AnswerForm()
