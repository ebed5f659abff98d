"""Tokens that are parts of characters: their bytes, names and places in answers, by a real tokenizer."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from emoe_jax.checkpoint import Tokenizer
from emoe_jax.models import load_tokenizer
from emoe_jax.requests.request import Completion, Delta, RequestOutput, TokenLogprob
from emoe_jax.requests.text import TextStream
from tests.checkpoint.test_tokenizer import KINDS
from tests.serve.conftest import StartServer
from tests.serve.events import events_of
from tests.serve.fake import FakeEngine, Running

TEMPLATE = "{{ messages[0].content }}{{ eos_token }}"
PATHS = ["/v1/chat/completions", "/v1/completions"]


class Reciter(FakeEngine):
    """Says the given tokens; the best alternatives are their neighbours."""

    says: list[int]

    def _advance(self, running: Running, completion: Completion, stream: TextStream) -> Delta:
        token = self.says[len(completion.token_ids)]
        completion.token_ids.append(token)
        last = len(completion.token_ids) == len(self.says)
        text, _ = stream.add(token)
        text += stream.flush() if last else ""
        completion.text += text
        completion.finish_reason = "stop" if last else None
        logprob = TokenLogprob(token, -1.0, ((token, -1.0), (token + 1, -2.0), (token + 2, -3.0)))
        assert completion.logprobs is not None
        completion.logprobs.append(logprob)
        scored = tuple(running.output.prompt_logprobs or ()) if len(completion.token_ids) == 1 else ()
        return Delta(running.output.request_id, 0, text, (token,), (logprob,), completion.finish_reason, scored)

    def add_request(self, request_id: str, prompt: Any, params: Any, **more: Any) -> list[int]:
        result = super().add_request(request_id, [1] * len(prompt), params, **more)
        running = self.running[request_id]
        running.output = RequestOutput(request_id, prompt, running.output.completions, "conv", "resident")
        if params.prompt_logprobs is not None:
            running.output.prompt_logprobs = [TokenLogprob(token, -2.0) for token in prompt[1:]]
        running.streams[0] = TextStream(self.tokenizer.stream(prompt))  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
        return result


@pytest.fixture(params=KINDS)
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    KINDS[request.param](tmp_path)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer is not None
    return tokenizer


@pytest.fixture
def client(tokenizer: Tokenizer, start_server: StartServer) -> Iterator[httpx.Client]:
    engine = Reciter(tokenizer)  # pyright: ignore[reportArgumentType]
    engine.says = [*tokenizer.encode("naïve 語 cats 😀", add_special_tokens=False), *tokenizer.eos_token_ids]
    with start_server(engine) as client:
        yield client


def bodies(path: str, prompt: str = "the") -> dict[str, Any]:
    if "chat" in path:
        return {"messages": [{"role": "user", "content": prompt}], "logprobs": True, "top_logprobs": 3}
    return {"prompt": prompt, "logprobs": 3}


@pytest.mark.parametrize("stream", [False, True])
def test_bytes_join_to_the_answer(client: httpx.Client, stream: bool) -> None:
    if stream:
        events = events_of(client, PATHS[0], **bodies(PATHS[0]), stream=True)
        choices = [event["choices"][0] for event in events if event["choices"]]
        text = "".join(choice["delta"].get("content") or "" for choice in choices)
        entries = [entry for choice in choices if choice["logprobs"] for entry in choice["logprobs"]["content"]]
    else:
        (choice,) = client.post(PATHS[0], json=bodies(PATHS[0])).json()["choices"]
        text, entries = choice["message"]["content"], choice["logprobs"]["content"]
    assert text.strip() == "naïve 語 cats 😀"
    assert b"".join(bytes(entry["bytes"]) for entry in entries) == text.encode()
    assert any(bytes(entry["bytes"]).decode(errors="ignore").encode() != bytes(entry["bytes"]) for entry in entries)
    for entry in entries:
        assert entry["top_logprobs"][0] == {name: entry[name] for name in ("token", "bytes", "logprob")}
        partial = entry["token"].startswith("bytes:")
        assert partial == (b"\xef\xbf\xbd" in bytes(entry["bytes"]).decode(errors="replace").encode())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("echo", [False, True])
def test_places_are_those_of_characters(client: httpx.Client, tokenizer: Tokenizer, stream: bool, echo: bool) -> None:
    body = {**bodies(PATHS[1], "the 語 cat"), "echo": echo}
    if stream:
        choices = [event["choices"][0] for event in events_of(client, PATHS[1], **body, stream=True)]
    else:
        choices = client.post(PATHS[1], json=body).json()["choices"]
    text = "".join(choice["text"] for choice in choices)
    logprobs = [choice["logprobs"] for choice in choices if choice["logprobs"]]
    offsets = [offset for part in logprobs for offset in part["text_offset"]]
    tokens = [token for part in logprobs for token in part["tokens"]]
    assert offsets == sorted(offsets)
    assert offsets[-1] == len(text)  # the end of the text has none itself
    for token, offset in zip(tokens, offsets, strict=True):
        if not token.startswith("bytes:") and token not in ("<s>", "</s>"):
            assert text[offset:].startswith((token, token.lstrip()))
    for part in logprobs:
        for token, top in zip(part["tokens"], part["top_logprobs"], strict=True):
            assert top is None or token in top
            assert top is None or "\ufffd" not in top


def test_no_two_tokens_have_one_name(tokenizer: Tokenizer, start_server: StartServer) -> None:
    vocabulary = tokenizer.backend.get_vocab()
    ids = [i for i in vocabulary.values() if tokenizer.token_bytes(i)[:1] >= b"\x80"]
    engine = Reciter(tokenizer)  # pyright: ignore[reportArgumentType]
    engine.says = [min(ids)]
    with start_server(engine) as client:
        (choice,) = client.post(PATHS[1], json=bodies(PATHS[1])).json()["choices"]
        (top,) = choice["logprobs"]["top_logprobs"]
        assert len(top) == 3
        strings = client.post("/tokenize", json={"prompt": "語", "return_token_strs": True}).json()["token_strs"]
    partial = [string.removeprefix("bytes:") for string in strings if string.startswith("bytes:")]
    assert len(partial) > 1
    assert "".join(partial) == r"\xe8\xaa\x9e"
