from typing import Any

import httpx
import pytest

from serve.answers import ChatChunk, ChatResponse
from serve.schema import ChatMessage
from tests.serve.conftest import StartServer
from tests.serve.events import events_of
from tests.serve.fake import MAX_MODEL_LEN, FakeEngine, FakeTokenizer

HELLO = [{"role": "user", "content": "hello"}]
PROMPT = "user:hello;assistant:"


def chat(client: httpx.Client, **body: Any) -> dict[str, Any]:
    response = client.post("/v1/chat/completions", json={"messages": HELLO, "max_tokens": 4, **body})
    assert response.status_code == 200, response.text
    ChatResponse.model_validate_json(response.text)
    return response.json()


def test_answers_with_usage_and_extension(client: httpx.Client) -> None:
    answer = chat(client, model="alias")
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": "abcd", "refusal": None}
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"] is None
    usage = {"prompt_tokens": len(PROMPT), "completion_tokens": 4, "total_tokens": len(PROMPT) + 4}
    assert answer["usage"] == usage | {"prompt_tokens_details": {"cached_tokens": 1}}
    assert answer["emoe"] == {"task": "conv", "routing": "resident", "substituted": 0.25, "substituted_weight": 0.125}


def test_defaults_are_vllms(start_server: StartServer) -> None:
    engine = FakeEngine(FakeTokenizer())
    with start_server(engine) as client:
        answer = chat(client, max_tokens=None)
    assert answer["usage"]["total_tokens"] == MAX_MODEL_LEN
    assert engine.requests[0]["params"].temperature == 1.0


def test_max_completion_tokens_wins(client: httpx.Client) -> None:
    assert chat(client, max_tokens=9, max_completion_tokens=2)["usage"]["completion_tokens"] == 2


def test_text_parts_are_joined(client: httpx.Client) -> None:
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    messages = [{"role": "system", "content": None}, {"role": "user", "content": parts}]
    answer = chat(client, messages=messages, return_token_ids=True)
    assert FakeTokenizer().decode(answer["prompt_token_ids"]) == "system:;user:hel\nlo;assistant:"


def test_an_assistant_may_have_said_nothing(client: httpx.Client) -> None:
    answer = chat(client, messages=[*HELLO, {"role": "assistant"}, *HELLO], return_token_ids=True)
    assert FakeTokenizer().decode(answer["prompt_token_ids"]) == "user:hello;assistant:;user:hello;assistant:"


def test_streams(client: httpx.Client) -> None:
    events = events_of(client, "/v1/chat/completions", messages=HELLO, max_tokens=3, n=2, stream=True)
    for event in events:
        assert event["object"] == "chat.completion.chunk"
        ChatChunk.model_validate(event)
    for index in (0, 1):
        choices = [event["choices"][0] for event in events if event["choices"][0]["index"] == index]
        assert choices[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(choice["delta"].get("content", "") for choice in choices) == "abc"
        assert [choice["finish_reason"] for choice in choices] == [None, None, None, "length"]
    assert events[-1]["emoe"]["task"] == "conv"
    assert all("emoe" not in event and "usage" not in event for event in events[:-1])


def test_streams_usage(client: httpx.Client) -> None:
    options = {"include_usage": True}
    body = {"messages": HELLO, "max_completion_tokens": 3, "stream": True, "stream_options": options}
    events = events_of(client, "/v1/chat/completions", **body)
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["completion_tokens"] == 3
    assert events[-1]["emoe"]["substituted"] == 0.25
    assert not any("usage" in event for event in events[:-1])


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_streams_usage_so_far(client: httpx.Client, path: str) -> None:
    body = {"messages": HELLO, "prompt": "hi", "max_tokens": 3, "n": 2, "stream": True}
    options = {"include_usage": True, "continuous_usage_stats": True}
    usages = [event["usage"] for event in events_of(client, path, **body, stream_options=options)]
    counts = [usage["completion_tokens"] for usage in usages]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (1, 6)
    assert all(usage["prompt_tokens"] == usages[-1]["prompt_tokens"] for usage in usages)
    assert all(usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] for usage in usages)
    alone = events_of(client, path, **body, stream_options={"continuous_usage_stats": True})
    assert not any("usage" in event for event in alone)


def test_logprobs(client: httpx.Client) -> None:
    (first,) = chat(client, logprobs=True, top_logprobs=1, max_tokens=1)["choices"][0]["logprobs"]["content"]
    assert first == {
        "token": "a",
        "bytes": [97],
        "logprob": -0.5,
        "top_logprobs": [{"token": "A", "bytes": [65], "logprob": -1.0}],
    }
    (plain,) = chat(client, logprobs=True, max_tokens=1)["choices"][0]["logprobs"]["content"]
    assert plain["top_logprobs"] == []
    events = events_of(client, "/v1/chat/completions", messages=HELLO, logprobs=True, max_tokens=2, stream=True)
    tokens = [event["choices"][0]["logprobs"]["content"][0]["token"] for event in events[1:]]
    assert tokens == ["a", "b"]


def test_a_template_that_fails_is_the_models_fault(client: httpx.Client) -> None:
    body = {"messages": [{"role": "user", "content": "break the template"}]}
    for path in ("/v1/chat/completions", "/tokenize"):
        response = client.post(path, json=body)
        assert response.status_code == 500
        assert "the model's chat template failed" in response.json()["error"]["message"]


def test_chat_needs_a_tokenizer(start_server: StartServer) -> None:
    with start_server(FakeEngine()) as client:
        response = client.post("/v1/chat/completions", json={"messages": HELLO})
        assert response.status_code == 400
        assert "send token ids to /v1/completions" in response.json()["error"]["message"]


def test_a_template_that_refuses_is_the_clients_fault(client: httpx.Client) -> None:
    body = {"messages": [{"role": "tool", "content": "42"}]}
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "messages"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
def test_the_template_gets_what_the_request_says(client: httpx.Client, path: str) -> None:
    def prompt(**body: Any) -> str:
        messages = [*HELLO, {"role": "assistant", "content": "well"}]
        answer = client.post(
            path, json={"messages": messages, "max_tokens": 1, "return_token_ids": True, **body}
        ).json()
        return FakeTokenizer().decode(answer.get("tokens") or answer["prompt_token_ids"])

    said = "user:hello;assistant:well"
    assert prompt() == prompt(add_generation_prompt=None) == f"{said};assistant:"
    assert prompt(add_generation_prompt=False) == f"{said};"
    assert prompt(continue_final_message=True) == said
    assert prompt(continue_final_message=True, add_generation_prompt=False) == said
    kwargs = {"enable_thinking": False, "x": [1]}
    assert prompt(chat_template_kwargs=kwargs) == f"enable_thinking=False;x=[1];{said};assistant:"
    both = client.post(path, json={"messages": HELLO, "continue_final_message": True, "add_generation_prompt": True})
    assert both.status_code == 400
    assert both.json()["error"]["param"] == "continue_final_message"
    assert client.post(path, json={"messages": HELLO, "chat_template_kwargs": [1]}).status_code == 400
    long = client.post(path, json={"messages": HELLO, "chat_template_kwargs": {"x": "y" * 1_000_000}})
    assert long.json()["error"]["code"] == "context_length_exceeded"


def test_the_server_has_defaults_of_its_own(start_server: StartServer) -> None:
    with start_server(FakeEngine(FakeTokenizer()), template_kwargs={"a": 1, "b": 2}) as client:
        answer = client.post("/tokenize", json={"messages": HELLO, "chat_template_kwargs": {"b": 3}}).json()
    assert FakeTokenizer().decode(answer["tokens"]) == "a=1;b=3;user:hello;assistant:"


def test_thoughts_reach_the_template() -> None:
    message = {"role": "assistant", "content": "4", "reasoning_content": "2 + 2"}
    assert ChatMessage.model_validate(message).to_template() == message


def test_a_checkpoint_has_sampling_defaults(start_server: StartServer) -> None:
    engine = FakeEngine(FakeTokenizer())
    defaults = {"temperature": 0.6, "top_k": 20, "repetition_penalty": 1.1, "max_tokens": 7}
    with start_server(engine, sampling_defaults=defaults) as client:
        assert client.get("/v1/models").json()["data"][0]["default_sampling_params"] == defaults
        assert chat(client, max_tokens=None)["usage"]["completion_tokens"] == 7
        chat(client, temperature=1.0, max_tokens=9)
        body = {"prompt": "hi", "top_k": 0}
        assert client.post("/v1/completions", json=body).json()["usage"]["completion_tokens"] == 7
    said = [(p.temperature, p.top_k, p.repetition_penalty) for p in (r["params"] for r in engine.requests)]
    assert said == [(0.6, 20, 1.1), (1.0, 20, 1.1), (0.6, 0, 1.1)]
    assert [request["params"].max_tokens for request in engine.requests] == [7, 9, 7]


def test_without_defaults_none_are_shown(client: httpx.Client) -> None:
    assert "default_sampling_params" not in client.get("/v1/models").json()["data"][0]
