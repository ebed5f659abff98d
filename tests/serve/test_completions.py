import json
from typing import Any

import httpx
import pytest

from serve.answers import CompletionResponse
from serve.errors import ErrorResponse
from tests.serve.conftest import StartServer
from tests.serve.events import events_of
from tests.serve.fake import MAX_MODEL_LEN, FakeEngine, FakeTokenizer


def complete(client: httpx.Client, **body: Any) -> dict[str, Any]:
    response = client.post("/v1/completions", json={"prompt": "hi", "max_tokens": 4, **body})
    assert response.status_code == 200, response.text
    CompletionResponse.model_validate_json(response.text)
    return response.json()


def test_answers_a_string_with_usage_and_extension(client: httpx.Client) -> None:
    answer = complete(client, model="fake")
    assert answer["object"] == "text_completion"
    assert answer["model"] == "fake"
    assert answer["id"].startswith("cmpl-")
    assert answer["choices"] == [{"index": 0, "text": "abcd", "logprobs": None, "finish_reason": "length"}]
    cached = {"cached_tokens": 1}
    usage = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7, "prompt_tokens_details": cached}
    assert answer["usage"] == usage
    assert answer["emoe"] == {"task": "conv", "routing": "resident", "substituted": 0.25, "substituted_weight": 0.125}


@pytest.mark.parametrize(
    ("prompt", "prompt_tokens", "choices"),
    [
        ("hi", 3, 1),
        (["hi", "you"], 7, 2),
        ([5, 6], 2, 1),
        ([[5], [6, 7]], 3, 2),
        (["hi"], 3, 1),
        ([[5, 6]], 2, 1),
    ],
)
def test_all_shapes_of_prompt(client: httpx.Client, prompt: Any, prompt_tokens: int, choices: int) -> None:
    answer = complete(client, prompt=prompt, n=2)
    assert answer["usage"]["prompt_tokens"] == prompt_tokens
    assert answer["usage"]["completion_tokens"] == 8 * choices
    assert [choice["index"] for choice in answer["choices"]] == list(range(2 * choices))


def test_sixteen_tokens_by_default_and_what_fits_near_the_limit(client: httpx.Client) -> None:
    assert complete(client, max_tokens=None)["usage"]["completion_tokens"] == 16
    near = complete(client, max_tokens=None, prompt=[1] * (MAX_MODEL_LEN - 3))
    assert near["usage"]["completion_tokens"] == 3


def test_stop_string_over_several_tokens(client: httpx.Client) -> None:
    answer = complete(client, stop="def", max_tokens=20)
    assert answer["choices"][0]["text"] == "abc"
    assert answer["choices"][0]["finish_reason"] == "stop"
    streamed = events_of(client, "/v1/completions", prompt="hi", stop=["def"], max_tokens=20, stream=True)
    assert "".join(event["choices"][0]["text"] for event in streamed) == "abc"
    assert streamed[-1]["choices"][0]["finish_reason"] == "stop"


def test_logprobs(client: httpx.Client) -> None:
    logprobs = complete(client, logprobs=2, max_tokens=2)["choices"][0]["logprobs"]
    assert logprobs == {
        "text_offset": [0, 1],
        "token_logprobs": [-0.5, -0.5],
        "tokens": ["a", "b"],
        "top_logprobs": [{"a": -0.5, "A": -1.0, "B": -2.0}, {"b": -0.5, "A": -1.0, "B": -2.0}],
    }
    assert complete(client, logprobs=0, max_tokens=1)["choices"][0]["logprobs"]["token_logprobs"] == [-9999.0]
    events = events_of(client, "/v1/completions", prompt="hi", logprobs=2, max_tokens=2, stream=True)
    assert [event["choices"][0]["logprobs"]["text_offset"] for event in events] == [[0], [1]]


def test_echo(client: httpx.Client) -> None:
    assert complete(client, echo=True)["choices"][0]["text"] == "hiabcd"
    assert complete(client, echo=True, prompt=[104, 105])["choices"][0]["text"] == "hiabcd"
    events = events_of(client, "/v1/completions", prompt="hi", echo=True, max_tokens=2, stream=True)
    assert [event["choices"][0]["text"] for event in events] == ["hia", "b"]


def test_echo_with_logprobs_scores_the_prompt(client: httpx.Client) -> None:
    body = {"echo": True, "logprobs": 1, "prompt": [104, 105, 33]}
    expected = {
        "tokens": ["h", "i", "!", "a"],
        "text_offset": [0, 1, 2, 3],
        "token_logprobs": [None, -2.0, -2.0, -0.5],
        "top_logprobs": [None, {"A": -1.0, "i": -2.0}, {"A": -1.0, "!": -2.0}, {"a": -0.5, "A": -1.0}],
    }
    answer = complete(client, **body, max_tokens=1)
    assert answer["choices"][0]["text"] == "hi!a"
    assert answer["choices"][0]["logprobs"] == expected
    streamed = events_of(client, "/v1/completions", **body, max_tokens=2, stream=True)
    assert streamed[0]["choices"][0]["logprobs"] == expected
    assert streamed[1]["choices"][0]["logprobs"]["text_offset"] == [4]

    scored = complete(client, **body, max_tokens=0, n=2)
    assert scored["usage"]["total_tokens"] == scored["usage"]["prompt_tokens"] == 3
    for choice in scored["choices"]:
        assert (choice["text"], choice["finish_reason"]) == ("hi!", "length")
        assert choice["logprobs"] == {name: values[:3] for name, values in expected.items()}
    text = complete(client, **{**body, "prompt": "hi!"}, max_tokens=1)["choices"][0]  # the tokenizer puts one in front
    assert text["logprobs"]["tokens"] == ["\x01", "h", "i", "!", "a"]
    assert text["logprobs"]["text_offset"] == [0, 0, 1, 2, 3]
    assert complete(client, prompt="hi", echo=True, max_tokens=0)["choices"][0]["text"] == "hi"


def test_return_token_ids(client: httpx.Client) -> None:
    choice = complete(client, return_token_ids=True, prompt=[7])["choices"][0]
    assert choice["prompt_token_ids"] == [7]
    assert choice["token_ids"] == [97, 98, 99, 100]


def test_streams_deltas_and_closes_with_the_extension(client: httpx.Client) -> None:
    with client.stream("POST", "/v1/completions", json={"prompt": "hi", "max_tokens": 3, "stream": True}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert "".join(event["choices"][0]["text"] for event in events) == "abc"
    assert [event["choices"][0]["finish_reason"] for event in events] == [None, None, "length"]
    assert "emoe" not in events[0]
    assert events[-1]["emoe"] == {
        "task": "conv",
        "routing": "resident",
        "substituted": 0.25,
        "substituted_weight": 0.125,
    }
    assert all("usage" not in event for event in events)
    for event in events:
        CompletionResponse.model_validate(event)


def test_stream_with_usage_ends_in_a_chunk_without_choices(client: httpx.Client) -> None:
    options = {"include_usage": True}
    body = {"prompt": ["hi", "you"], "n": 2, "max_tokens": 3, "stream": True, "stream_options": options}
    events = events_of(client, "/v1/completions", **body)
    assert events[-1]["choices"] == []
    cached = {"cached_tokens": 2}
    usage = {"prompt_tokens": 7, "completion_tokens": 12, "total_tokens": 19, "prompt_tokens_details": cached}
    assert events[-1]["usage"] == usage
    assert events[-1]["emoe"]["routing"] == "resident"
    assert all("emoe" not in event for event in events[:-1])
    texts = ["", "", "", ""]
    for event in events[:-1]:
        texts[event["choices"][0]["index"]] += event["choices"][0]["text"]
    assert texts == ["abc"] * 4


def test_request_extension_and_sampling_reach_the_engine(start_server: StartServer) -> None:
    engine = FakeEngine(FakeTokenizer())
    with start_server(engine) as client:
        answer = complete(
            client,
            temperature=0.5,
            top_p=0.9,
            top_k=7,
            min_p=0.1,
            seed=3,
            stop_token_ids=[9],
            ignore_eos=True,
            frequency_penalty=0.5,
            presence_penalty=-1,
            repetition_penalty=1.2,
            logit_bias={"5": -100, "7": 2.5},
            emoe={"task": "qa", "routing": "exact", "slo": {"ttft_ms": 200, "latency_ms": 2000.5}},
        )
    assert answer["emoe"]["task"] == "qa"
    assert answer["emoe"]["routing"] == "exact"
    assert answer["choices"][0]["text"] == "defg"
    (request,) = engine.requests
    assert (request["slo"].ttft_ms, request["slo"].latency_ms) == (200, 2000.5)
    params = request["params"]
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.5, 0.9, 7, 0.1)
    assert (params.frequency_penalty, params.presence_penalty, params.repetition_penalty) == (0.5, -1, 1.2)
    assert params.logit_bias == {5: -100, 7: 2.5}
    assert (params.stop_token_ids, params.ignore_eos) == ((9,), True)


def test_neutral_values_of_unsupported_parameters_are_accepted(client: httpx.Client) -> None:
    complete(client, presence_penalty=0, frequency_penalty=0.0, logit_bias={}, best_of=1, suffix=None, user="me")


def test_a_model_without_tokenizer_takes_and_returns_ids(start_server: StartServer) -> None:
    with start_server(FakeEngine()) as client:
        answer = complete(client, prompt=[5], return_token_ids=True, logprobs=0, max_tokens=1)
        assert answer["choices"][0]["token_ids"] == [97]
        assert answer["choices"][0]["logprobs"]["tokens"] == ["token_id:97"]
        refused = client.post("/v1/completions", json={"prompt": "hi"})
        assert refused.status_code == 400
        assert ErrorResponse.model_validate_json(refused.text).error.param == "prompt"
        for path, body in (("/detokenize", {"tokens": [5]}), ("/v1/completions", {"prompt": [5], "echo": True})):
            error = ErrorResponse.model_validate_json(client.post(path, json=body).text).error
            assert error.message == "this model has no tokenizer, so its token ids have no text"
