"""What clients, metrics and log see of answers for which the model computed NaN."""

import json
from typing import Any

import httpx
import pytest

from emoe_jax.requests.request import Delta
from tests.serve.conftest import StartServer
from tests.serve.fake import FakeEngine, FakeTokenizer


class LosingEngine(FakeEngine):
    """The answers `lost` of every request end with NaN once they have `sound` tokens."""

    def __init__(self, sound: int, lost: tuple[int, ...] = (0,)):
        super().__init__(FakeTokenizer())
        self._sound, self._lost = sound, lost

    def _advance(self, running: Any, completion: Any, stream: Any) -> Delta:
        if completion.index not in self._lost or len(completion.token_ids) < self._sound:
            return super()._advance(running, completion, stream)
        completion.finish_reason, completion.error = "error", "the model computed numbers that are not finite"
        return Delta(running.output.request_id, completion.index, "", (), finish_reason="error", error=completion.error)


ENDPOINTS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": "hi"}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
]


def metric(client: httpx.Client, line: str) -> float:
    lines = client.get("/metrics").text.splitlines()
    return float(next((found.rsplit(" ", 1)[1] for found in lines if found.startswith(line)), 0))


@pytest.mark.parametrize(("path", "body"), ENDPOINTS)
def test_without_a_token_it_is_a_server_error(start_server: StartServer, path: str, body: dict[str, Any]) -> None:
    with start_server(LosingEngine(0)) as client:
        response = client.post(path, json=body | {"max_tokens": 5})
        assert response.status_code == 500
        error = response.json()["error"]
        assert (error["type"], error["code"]) == ("server_error", "internal_error")
        assert "not finite" in error["message"]
        assert metric(client, 'emoe:request_success_total{finished_reason="error"') == 1
        assert metric(client, "emoe:time_to_first_token_seconds_count") == 0
        assert client.get("/health").status_code == 200


@pytest.mark.parametrize(("path", "body"), ENDPOINTS)
def test_the_other_choices_are_whole(start_server: StartServer, path: str, body: dict[str, Any]) -> None:
    with start_server(LosingEngine(2, lost=(1,))) as client:
        response = client.post(path, json=body | {"max_tokens": 4, "n": 3, "return_token_ids": True})
    assert response.status_code == 200
    choices = response.json()["choices"]
    assert [choice["finish_reason"] for choice in choices] == ["length", "error", "length"]
    assert [len(choice["token_ids"]) for choice in choices] == [4, 2, 4]


@pytest.mark.parametrize(("path", "body"), ENDPOINTS)
@pytest.mark.parametrize("sound", [0, 3])
def test_a_stream_ends_with_an_error_event(
    start_server: StartServer, path: str, body: dict[str, Any], sound: int
) -> None:
    with start_server(LosingEngine(sound)) as client:
        text = client.post(path, json=body | {"max_tokens": 5, "n": 2, "stream": True}).text
    *events, done = [line.removeprefix("data: ") for line in text.splitlines() if line]
    assert done == "[DONE]"
    chunks = [json.loads(event) for event in events]
    assert "not finite" in chunks.pop()["error"]["message"]
    assert not any("error" in chunk for chunk in chunks)
    reasons = {c["index"]: c["finish_reason"] for chunk in chunks for c in chunk["choices"] if c["finish_reason"]}
    assert reasons == {0: "error", 1: "length"}


def test_scoring_without_an_answer(start_server: StartServer) -> None:
    body = {"prompt": "hi there", "max_tokens": 0, "echo": True, "logprobs": 1}
    with start_server(LosingEngine(0)) as client:
        response = client.post("/v1/completions", json=body)
        assert response.status_code == 500
        two = client.post("/v1/completions", json=body | {"prompt": ["a", "b"]})
        assert two.status_code == 500
