"""Clients that others wrote, against the real server; openai-python has its tests in test_process.py."""

import asyncio
import importlib
import importlib.util
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from pydantic import BaseModel

from emoe_jax import Engine
from tests.serve.checkpoint import MAX_MODEL_LEN
from tests.serve.process import ServerProcess, server_process

pytestmark = pytest.mark.filterwarnings("ignore")  # what clients deprecate is theirs

HELLO = "hello there, how are you?"
TOO_LONG = "hello " * MAX_MODEL_LEN
EXACT = {"ignore_eos": True, "emoe": {"routing": "exact"}}

LOCUSTFILE = """
import json
from locust import HttpUser, constant, task

class Visitor(HttpUser):
    wait_time = constant(0.1)

    @task
    def chats(self):
        body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 8, "ignore_eos": True}
        with self.client.post("/v1/chat/completions", json=body, catch_response=True) as answer:
            if answer.status_code != 200 or answer.json()["usage"]["completion_tokens"] != 8:
                answer.failure(answer.text)

    @task
    def streams(self):
        body = {"prompt": "hello", "max_tokens": 8, "ignore_eos": True, "stream": True}
        with self.client.post("/v1/completions", json=body, stream=True, catch_response=True) as answer:
            *_, last, done = [line for line in answer.iter_lines() if line]
            if done != b"data: [DONE]" or json.loads(last[6:])["choices"][0]["finish_reason"] != "length":
                answer.failure(str(last))
"""

TASKS = {
    "choices": """
task: choices
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: ["fine", "and you? I am fine"]
doc_to_target: 0
""",
    "answers": """
task: answers
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: ""
generation_kwargs: {until: ["never said"], max_gen_toks: 8, do_sample: false}
""",
}
DATA = """dataset_path: json
dataset_kwargs: {data_files: {test: data.jsonl}}
test_split: test
"""


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason="needs the clients extra")


@pytest.fixture(scope="module")
def server(tiny: Path) -> Iterator[ServerProcess]:
    arguments = ("--model", str(tiny), "--expert-memory", "100%", "--max-num-seqs", "4")
    with server_process(*arguments, "--max-num-batched-tokens", "64") as server:
        yield server


class Verdict(BaseModel):
    """Whether all is well."""

    ok: bool


@needs("langchain_openai")
def test_langchain(server: ServerProcess) -> None:
    langchain: Any = importlib.import_module("langchain_openai")
    exceptions: Any = importlib.import_module("langchain_core.exceptions")
    common = {"model": "tiny", "base_url": f"{server.url}/v1", "api_key": "none", "max_retries": 0, "temperature": 0}
    chat = langchain.ChatOpenAI(**common, max_tokens=20, stream_usage=True, extra_body=EXACT)
    whole = chat.invoke(HELLO)
    assert whole.usage_metadata["output_tokens"] == 20
    assert whole.response_metadata["finish_reason"] == "length"
    chunks = list(chat.stream(HELLO))
    assert "".join(chunk.content for chunk in chunks) == whole.content
    assert [chunk.usage_metadata["output_tokens"] for chunk in chunks if chunk.usage_metadata] == [20]
    assert [answer.content for answer in chat.batch([HELLO] * 4)] == [whole.content] * 4
    verdict = langchain.ChatOpenAI(**common).with_structured_output(Verdict).invoke(HELLO)
    assert isinstance(verdict, Verdict)
    with pytest.raises(exceptions.ContextOverflowError):
        chat.invoke(TOO_LONG)
    completion = langchain.OpenAI(**common, max_tokens=20, extra_body=EXACT)
    assert "".join(completion.stream(HELLO)) == completion.invoke(HELLO)


@needs("litellm")
def test_litellm(server: ServerProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own, as it keeps sockets and an event loop to the end."""
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it looks for one on the internet
    process = multiprocessing.get_context("spawn").Process(target=_use_litellm, args=(f"{server.url}/v1",))
    process.start()
    process.join()
    assert process.exitcode == 0


def _use_litellm(url: str) -> None:
    litellm: Any = importlib.import_module("litellm")
    common = {"api_base": url, "api_key": "none", "max_retries": 0, "temperature": 0}
    ask = {**common, "model": "openai/tiny", "messages": [{"role": "user", "content": HELLO}], "max_tokens": 20}
    whole = litellm.completion(**ask, extra_body=EXACT)
    text = whole.choices[0].message.content
    assert whole.usage.completion_tokens == 20
    chunks = list(litellm.completion(**ask, extra_body=EXACT, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
    assert chunks[-1].usage.completion_tokens == 20
    assert asyncio.run(litellm.acompletion(**ask, extra_body=EXACT)).choices[0].message.content == text
    scored = litellm.text_completion(
        **common, model="text-completion-openai/tiny", prompt="hello", max_tokens=4, logprobs=1, echo=True
    )
    assert scored.choices[0].text.startswith("hello")
    assert scored.choices[0].logprobs.token_logprobs[0] is None
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(**{**ask, "model": "openai/other"})
    for beyond in ({"messages": [{"role": "user", "content": TOO_LONG}]}, {"max_tokens": MAX_MODEL_LEN}):
        with pytest.raises(litellm.ContextWindowExceededError):
            litellm.completion(**{**ask, **beyond})


@needs("locust")
def test_locust_sees_no_failure(server: ServerProcess, tmp_path: Path) -> None:
    (tmp_path / "locustfile.py").write_text(LOCUSTFILE, encoding="utf-8")
    load = ("--headless", "--users", "20", "--spawn-rate", "20", "--run-time", "3s", "--stop-timeout", "30", "--json")
    run = subprocess.run(
        [sys.executable, "-m", "locust", *load, "--host", server.url], cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    stats = json.loads(run.stdout)
    assert {entry["name"] for entry in stats} == {"/v1/chat/completions", "/v1/completions"}
    assert sum(entry["num_requests"] for entry in stats) >= 20
    assert not any(entry["num_failures"] for entry in stats)


@needs("lm_eval")
def test_lm_eval_scores_as_the_library_does(server: ServerProcess, tiny: Path, tmp_path: Path) -> None:
    texts = [HELLO, "user: hello there"]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    for name, task in TASKS.items():
        (tmp_path / f"{name}.yaml").write_text(DATA + task, encoding="utf-8")
    settings = {"model": "tiny", "base_url": f"{server.url}/v1/completions", "tokenizer": tiny, "num_concurrent": 2}
    settings["max_length"] = MAX_MODEL_LEN
    arguments = ["--model", "local-completions", "--tasks", ",".join(TASKS), "--include_path", "."]
    arguments += ["--model_args", ",".join(f"{name}={value}" for name, value in settings.items())]
    run = subprocess.run(
        [sys.executable, "-m", "lm_eval", "run", *arguments, "--log_samples", "--output_path", "out"],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    with Engine.load(str(tiny), expert_memory="100%") as engine:
        tokenizer = engine.tokenizer
        assert tokenizer is not None
        for sample in _samples(tmp_path, "choices"):
            for (context, choice), ((logprob, greedy),) in zip(_requests(sample), sample["resps"], strict=True):
                tokens, begin = tokenizer.encode(context + choice, False), len(tokenizer.encode(context, False))
                expected, likeliest = _score(np.asarray(engine.logits(tokens)), tokens, begin)
                assert float(logprob) == pytest.approx(expected, abs=1e-3)
                assert greedy == str(likeliest)
        for sample in _samples(tmp_path, "answers"):
            body = {"prompt": tokenizer.encode(sample["doc"]["text"], False), "max_tokens": 8, "temperature": 0}
            answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()
            assert sample["resps"] == [[answer["choices"][0]["text"]]]


def _samples(directory: Path, task: str) -> list[dict[str, Any]]:
    (path,) = (directory / "out").rglob(f"samples_{task}_*.jsonl")
    samples = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(samples) == 2
    return samples


def _requests(sample: dict[str, Any]) -> list[tuple[str, str]]:
    """Context and continuation, one after a blank."""
    return [(arguments["arg_0"], arguments["arg_1"]) for arguments in sample["arguments"].values()]


def _score(logits: np.ndarray, tokens: list[int], begin: int) -> tuple[float, bool]:
    """Log probability of the tokens from `begin` on, and whether each is the likeliest."""
    logits, chosen = logits[begin - 1 : -1].astype(np.float64), tokens[begin:]
    logprobs = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    return float(logprobs[range(len(chosen)), chosen].sum()), logits.argmax(-1).tolist() == chosen
