"""The real server with a real engine, from the command line to SIGTERM."""

import json
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from pydantic import BaseModel, ConfigDict

from emoe_jax.scheduling.pages import PAGE_SIZE
from serve.options import DEMO_MODEL
from tests.serve.checkpoint import MAX_MODEL_LEN
from tests.serve.events import events_of
from tests.serve.process import ServerProcess, server_process
from tests.serve.resident import TOLERANCE, needs_proc, resident_bytes
from tests.serve.test_load import cut_stream

HELLO: list[Any] = [{"role": "user", "content": "hello there"}]
FEW_STEPS = ("--max-num-seqs", "1", "--max-num-batched-tokens", "16")
"""Options of a server that compiles few."""


class Verdict(BaseModel):
    """Whether all is well."""

    model_config = ConfigDict(extra="forbid")

    ok: bool


@pytest.fixture(scope="module")
def server(tiny: Path) -> Iterator[ServerProcess]:
    arguments = ("--model", str(tiny), "--expert-memory", "50%", "--max-num-seqs", "2", "--host-memory", "0")
    with server_process(
        *arguments, "--max-num-batched-tokens", "16", "--api-key", "secret", "--log-format", "json"
    ) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def http(server: ServerProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, headers={"authorization": "Bearer secret"}, timeout=60) as client:
        yield client


def test_tells_what_it_serves(server: ServerProcess) -> None:
    printed = "".join(server.output)
    for expected in ("tiny (mixtral)", "memory: slab", "4 of 8 in each of 1 layers (50%)", "resident", server.url):
        assert expected in printed
    assert "Traceback" not in printed
    assert re.search(r"started in \d+\.\d s: imports \d+\.\d, checkpoint .*, compile .*, server \d", printed)
    assert "slow: 4 of 8 experts have room neither on the device nor in host memory" in printed


def test_on_loopback_only_its_names_are_answered_to(http: httpx.Client) -> None:
    assert http.get("/health", headers={"host": "localhost"}).status_code == 200
    assert http.get("/health", headers={"host": "rebound.example"}).status_code == 400


def test_progress_is_printed_without_a_terminal(server: ServerProcess) -> None:
    progress = [line for line in server.output if line.startswith("loading: ")]
    assert "/tiny" in progress[0]
    for expected in ("weights 100%", "experts 100%", "compile 0%", "compile 100%"):
        assert sum(expected in line for line in progress) == 1
    assert any(re.search(r"compile [456]\d%", line) for line in progress)
    assert len(progress) < 20


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_compiling_ends_the_process(tiny: Path, tmp_path: Path, number: signal.Signals) -> None:
    environment = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path)}  # empty, so there is something to compile
    environment |= {"XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}  # and it takes long
    server = ServerProcess(("--model", str(tiny)), environment)
    try:
        server.wait_for("loading: compile", 120)
        time.sleep(0.5)  # well into it
        server.process.send_signal(number)
        assert server.wait(3) == 130
        assert "Traceback" not in "".join(server.output)
    finally:
        server.close()


def test_openai_client_completes(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    answer = client.completions.create(
        model=model.id, prompt="hello", max_tokens=8, temperature=0, logprobs=2, extra_body={"ignore_eos": True}
    )
    (choice,) = answer.choices
    assert choice.finish_reason == "length"
    assert choice.logprobs is not None
    assert choice.logprobs.tokens is not None
    assert len(choice.logprobs.tokens) == 8
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8
    emoe: Any = answer.model_extra and answer.model_extra["emoe"]
    assert emoe["routing"] == "bounded"
    assert emoe["tolerance"] == 0.3  # of two choices: what the search begins with
    assert 0 <= emoe["substituted"] <= 1


def test_openai_client_streams_what_it_answers_whole(client: openai.OpenAI) -> None:
    settings: Any = {"model": "tiny", "messages": HELLO, "max_completion_tokens": 20, "temperature": 0}
    exact = {"emoe": {"routing": "exact"}}
    whole = client.chat.completions.create(**settings, extra_body=exact)
    options: Any = {"include_usage": True}
    stream = client.chat.completions.create(**settings, stream=True, stream_options=options, extra_body=exact)
    chunks = list(stream)
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].message.content
    usage = chunks[-1].usage
    assert usage is not None
    assert whole.usage is not None
    assert usage.total_tokens == whole.usage.total_tokens
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == (usage.prompt_tokens - 1) // PAGE_SIZE * PAGE_SIZE
    assert chunks[-1].model_extra == {
        "emoe": {"task": None, "routing": "exact", "substituted": 0.0, "substituted_weight": 0.0}
    }


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "judge"}}])
def test_a_model_that_knows_no_tools_calls_one_where_it_has_to(client: openai.OpenAI, choice: Any) -> None:
    schema = {"properties": {"wet": {"type": "boolean"}}, "required": ["wet"], "additionalProperties": False}
    tools: Any = [{"type": "function", "function": {"name": "judge", "parameters": {"type": "object", **schema}}}]
    settings: Any = {"model": "tiny", "messages": HELLO, "temperature": 0, "tools": tools, "tool_choice": choice}
    settings |= {"parallel_tool_calls": False, "extra_body": {"emoe": {"routing": "exact"}}}
    whole = client.chat.completions.create(**settings).choices[0]
    assert (whole.finish_reason, whole.message.content) == ("tool_calls", None)
    call: Any = (whole.message.tool_calls or [])[0]
    assert call.type == "function"
    assert call.function.name == "judge"
    assert type(json.loads(call.function.arguments)["wet"]) is bool
    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**settings, stream=True)]
    deltas: list[Any] = [delta for chunk in chunks for delta in chunk.delta.tool_calls or ()]
    assert [(delta.index, delta.function.name) for delta in deltas if delta.id] == [(0, "judge")]
    assert "".join(delta.function.arguments or "" for delta in deltas) == call.function.arguments
    assert chunks[-1].finish_reason == "tool_calls"
    messages = [*HELLO, whole.message.model_dump(), {"role": "tool", "tool_call_id": call.id, "content": "yes"}]
    assert client.chat.completions.create(**settings | {"messages": messages, "tool_choice": "none"}).choices


def test_responses_go_on_from_a_call_to_a_verdict(client: openai.OpenAI) -> None:
    tool: Any = {"type": "function", "name": "judge", "parameters": Verdict.model_json_schema()}
    settings: Any = {"model": "tiny", "temperature": 0, "extra_body": {"emoe": {"routing": "exact"}}}
    forced = {**settings, "tools": [tool], "tool_choice": "required", "parallel_tool_calls": False}
    judged = client.responses.create(**forced, input="hello there")
    with client.responses.stream(**forced, input="hello there") as stream:
        arguments = [event.delta for event in stream if event.type == "response.function_call_arguments.delta"]
    for response in (judged, stream.get_final_response()):
        call: Any = response.output[-1]
        assert (len(response.output), call.name, response.status) == (1, "judge", "completed")
        assert call.arguments == "".join(arguments)
        Verdict.model_validate_json(call.arguments, strict=True)
    result: Any = {"type": "function_call_output", "call_id": judged.output[-1].call_id, "output": "yes"}
    asked = {**settings, "input": [result], "previous_response_id": judged.id, "text_format": Verdict}
    parsed = client.responses.parse(**asked)
    assert isinstance(parsed.output_parsed, Verdict)
    assert (parsed.model_extra or {})["emoe"]["routing"] == "exact"
    assert parsed.usage is not None
    again = client.responses.parse(**asked).usage
    assert again is not None
    assert again.input_tokens_details.cached_tokens == (parsed.usage.input_tokens - 1) // PAGE_SIZE * PAGE_SIZE


def test_openai_client_understands_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-5", messages=HELLO)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as invalid:
        client.chat.completions.create(model="tiny", messages=HELLO, temperature=-1)
    assert invalid.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="tiny", prompt=[5] * MAX_MODEL_LEN)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()


def test_several_prompts_and_answers_with_a_seed(http: httpx.Client) -> None:
    body = {"prompt": ["hello", "how are you?"], "n": 2, "max_tokens": 6, "seed": 7}
    first, second = (http.post("/v1/completions", json=body).json()["choices"] for _ in range(2))
    assert [choice["text"] for choice in first] == [choice["text"] for choice in second]
    assert [choice["index"] for choice in first] == [0, 1, 2, 3]


@pytest.mark.parametrize("stream", [False, True])
def test_answers_match_their_schema(client: openai.OpenAI, stream: bool) -> None:
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    schema["additionalProperties"] = False
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "verdict", "schema": schema}}
    options: dict[str, Any] = {"model": "tiny", "messages": HELLO, "n": 2, "seed": 1, "temperature": 1.5}
    texts = ["", ""]
    if stream:
        for chunk in client.chat.completions.create(**options, response_format=wanted, stream=True):
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
    else:
        answer = client.chat.completions.create(**options, response_format=wanted)
        texts = [choice.message.content or "" for choice in answer.choices]
    assert all(json.loads(text) in ({"ok": True}, {"ok": False}) for text in texts)
    schema["properties"] = {"ok": {"type": "bool"}}
    with pytest.raises(openai.BadRequestError, match=r"response_format cannot be used: .*bool"):
        client.chat.completions.create(**options, response_format=wanted)


def test_a_tool_that_calls_cannot_be_held_to_is_named(client: openai.OpenAI) -> None:
    functions = [{"name": "fine"}, {"name": "odd", "parameters": {"properties": {"x": {"type": "thing"}}}}]
    tools: Any = [{"type": "function", "function": function} for function in functions]
    with pytest.raises(openai.BadRequestError, match=r"parameters of 'odd' cannot be used: .*thing") as refusal:
        client.chat.completions.create(model="tiny", messages=HELLO, tools=tools, tool_choice="required")
    assert refusal.value.param == "tools[1].function.parameters"


def test_tokens_and_state(http: httpx.Client) -> None:
    tokens = http.post("/tokenize", json={"prompt": "grüße", "add_special_tokens": False}).json()["tokens"]
    assert http.post("/detokenize", json={"tokens": tokens}).json() == {"prompt": "grüße"}
    chat = http.post("/tokenize", json={"messages": HELLO}).json()["tokens"]
    assert http.post("/detokenize", json={"tokens": chat}).json()["prompt"] == "user: hello there\nassistant:"
    state = http.get("/v1/emoe/state").json()
    assert [len(layer) for layer in state["residency"]["experts"]] == [4]
    metrics = http.get("/metrics", headers={"authorization": ""}).text
    for name in ("num_requests_running", "kv_cache_usage_perc", "expert_loads_total", "planning_seconds_total"):
        assert f'\nemoe:{name}{{model_name="tiny"}} ' in metrics
    assert 'emoe:experts_resident{layer="0",model_name="tiny"} 4.0' in metrics
    assert http.get("/").headers["content-type"].startswith("text/html")


def test_a_client_that_leaves_frees_the_engine(http: httpx.Client) -> None:
    body = {"prompt": "hello", "max_tokens": 200, "ignore_eos": True, "stream": True}
    with http.stream("POST", "/v1/completions", json=body) as response:
        next(response.iter_lines())
    deadline = time.monotonic() + 10
    while (scheduler := http.get("/v1/emoe/state").json()["scheduler"])["running"]:
        assert time.monotonic() < deadline
    assert scheduler["waiting"] == 0


@needs_proc
def test_cancelled_streams_leave_nothing(server: ServerProcess, http: httpx.Client) -> None:
    """Under both contracts: what an `exact` step pins, the next ones need, as half of the experts have no slot."""

    def cut(count: int) -> int:
        with ThreadPoolExecutor(8) as pool:
            for future in [pool.submit(cut_one, index) for index in range(count)]:
                future.result()
        deadline = time.monotonic() + 20
        while (scheduler := http.get("/v1/emoe/state").json()["scheduler"])["running"] or scheduler["waiting"]:
            assert time.monotonic() < deadline
        assert scheduler["pages_used"] == 0
        return resident_bytes(server.process.pid)

    def cut_one(index: int) -> None:
        routing = {"routing": ("resident", "exact")[index % 2]}
        body = {"prompt": f"hello {index}", "max_tokens": 200, "ignore_eos": True, "stream": True, "emoe": routing}
        cut_stream(http.base_url.port or 80, json.dumps(body).encode(), "Authorization: Bearer secret")

    before = cut(100)
    assert abs(cut(200) - before) < TOLERANCE
    for routing in ("resident", "exact"):
        body = {"prompt": "hello", "max_tokens": 40, "ignore_eos": True, "emoe": {"routing": routing}}
        answer = http.post("/v1/completions", json=body).json()
        assert answer["usage"]["completion_tokens"] == 40


@pytest.mark.parametrize(("timeout", "signals"), [("0", 1), ("60", 2)])
def test_a_forced_end_takes_seconds(tiny: Path, timeout: str, signals: int) -> None:
    """Without a timeout, or by a second signal: running requests are told, and a half-sent one holds up nobody."""
    arguments = ("--model", str(tiny), *FEW_STEPS, "--shutdown-timeout", timeout)
    body = {"prompt": "hello", "max_tokens": 200, "ignore_eos": True}
    with server_process(*arguments) as server, ThreadPoolExecutor(40) as pool:
        port = int(server.url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as slow:
            slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n")
            answers = [
                pool.submit(httpx.post, f"{server.url}/v1/completions", json=body, timeout=60) for _ in range(40)
            ]
            while httpx.get(f"{server.url}/v1/emoe/state").json()["scheduler"]["waiting"] < 20:
                time.sleep(0.001)
            server.process.send_signal(signal.SIGTERM)
            if signals == 2:
                server.wait_for("shutting down", 4)
                server.process.send_signal(signal.SIGTERM)
            assert server.wait(4) == 0
        accepted = [answer for answer in answers if not isinstance(answer.exception(), httpx.TransportError)]
        assert len(accepted) > 20  # others may have come when nobody listened any more
        assert 503 in {answer.result().status_code for answer in accepted}
        assert "Traceback" not in "".join(server.output)


def test_signals_while_it_tidies_up_print_nothing(tiny: Path) -> None:
    with server_process("--model", str(tiny), *FEW_STEPS) as server:
        server.process.send_signal(signal.SIGINT)
        server.wait_for("shut down", 10)
        while server.process.poll() is None:
            server.process.send_signal(signal.SIGINT)
            time.sleep(0.05)
        assert server.wait(4) in (0, 130)
        assert "Traceback" not in "".join(server.output)


def test_sigterm_lets_running_requests_finish(server: ServerProcess, http: httpx.Client) -> None:
    """Last in this module: the server is gone afterwards."""
    body = {"prompt": "hello", "max_tokens": 200, "ignore_eos": True, "stream": True}
    events: list[dict[str, Any]] = []
    reader = threading.Thread(target=lambda: events.extend(events_of(http, "/v1/completions", **body)))
    reader.start()
    while not http.get("/v1/emoe/state").json()["scheduler"]["running"]:
        time.sleep(0.001)
    server.process.send_signal(signal.SIGTERM)
    reader.join()
    assert server.wait(4) == 0
    assert events[-1]["choices"][0]["finish_reason"] == "length"
    printed = "".join(server.output)
    assert "Traceback" not in printed
    assert "hello" not in printed, "prompts must not be logged"
    *_, waiting, request, end = (json.loads(line) for line in server.output if line.startswith("{"))
    assert waiting["message"] == "shutting down: waiting up to 30 s for 1 request; Ctrl-C again to stop now"
    assert request["route"] == "/v1/completions"
    assert request["completion_tokens"] == 200
    assert end["message"] == "shut down"


@pytest.mark.skipif(not (DEMO_MODEL / "config.json").is_file(), reason="the demo model has not been trained")
def test_without_arguments_the_demo_model_answers() -> None:
    with server_process() as server:
        question = [{"role": "user", "content": "Hello, how are you?"}]
        body = {"messages": question, "max_tokens": 32, "temperature": 0}
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()
        assert answer["model"] == "demo"
        assert answer["choices"][0]["message"]["content"].strip()
