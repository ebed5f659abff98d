"""Mistakes on the command line: one line on stderr, status 2."""

import asyncio
import logging
import socket
import threading
import time
from pathlib import Path

import httpx
import pytest

from serve import main as command
from serve.app import create_app
from serve.http.server import Server, bind, url_of
from serve.options import as_flags, parse_options
from serve.service import Service
from serve.text import TextCodec
from serve.worker import EngineWorker
from tests.serve.fake import VOCAB_SIZE, FakeEngine, FakeTokenizer


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that the command prints before it exits with status 2."""
    try:
        status = command.main(arguments)
    except SystemExit as error:
        status = error.code
    assert status == 2
    output = capsys.readouterr().err.strip().splitlines()
    assert output[-1].startswith("error: ")
    assert "Traceback" not in "".join(output)
    assert not output[-1].startswith("error: argument"), "one form, before the model is read and after"
    return output[-1]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--modle", "x"], "--modle"),
        (["--port", "70000"], "--port"),
        (["--record-prompt-tokens"], "--record-prompt-tokens needs --record-traces"),
        (["--trace-ranks", "8"], "--trace-ranks needs --record-traces"),
        (["--port", "http"], "--port"),
        (["--max-num-seqs", "0"], "--max-num-seqs"),
        (["--max-num-seqs", "999999999"], "--max-num-seqs"),
        (["--max-num-seqs", "2000"], "--max-num-batched-tokens (512) is below --max-num-seqs (2000)"),
        (["--max-model-len", "999999999"], "--max-model-len is 999999999"),
        (["--expert-memory", "0"], "--expert-memory: '0' is nothing"),
        (["--expert-memory", "-5%"], "--expert-memory '-5%' is not an amount"),
        (["--expert-memory", "much"], "--expert-memory 'much' is not an amount"),
        (["--expert-memory", "9999 slots"], "--expert-memory of 9999 slots is more than all experts; a layer has "),
        (["--expert-memory", "40"], "a number without a unit is slots: say 40% or 40MB"),
        (["--expert-memory", "1%"], "--expert-memory of 1% gives 0 or 1 expert slots"),
        (["--host-memory", "40%"], "--host-memory '40%' is not an amount of bytes"),
        (
            ["--chat-template", "/nonexistent/x.jinja"],
            "--chat-template is '/nonexistent/x.jinja', which cannot be read",
        ),
        (["--chat-template-kwargs", "{x"], "--chat-template-kwargs is '{x'; expected a JSON object such as"),
        (["--chat-template-kwargs", "[1]"], "--chat-template-kwargs is '[1]'; expected a JSON object such as"),
        (["--chat-template-kwargs", '{"messages": []}'], "--chat-template-kwargs: cannot set messages"),
        (["--link-bandwidth", "fast"], "--link-bandwidth 'fast' is not an amount of bytes"),
        (["--link-bandwidth", "0GiB"], "--link-bandwidth is '0GiB'"),
        (["--record-traces", "trace.csv"], "--record-traces: trace.csv"),
        (["--record-traces", "/nonexistent/trace.npz"], "--record-traces: /nonexistent/trace.npz"),
        (["--model", ""], "--model"),
        (["--allowed-origins", '["*"]'], "--allowed-origins"),
        (["--allowed-origins", "https://example.org/page"], "--allowed-origins"),
        (["--allowed-hosts", "example.org:8000"], "--allowed-hosts"),
        (["--root-path", "llm"], "--root-path: 'llm' is not of the form /path"),
        (["--root-path", "/a b"], "--root-path"),
        (["--root-path", "/a//b"], "--root-path"),
        (["--root-path", "/v1/"], "--root-path: '/v1/' begins /v1/chat/completions"),
        (["--root-path", "/metrics"], "--root-path: '/metrics' begins /metrics"),
        (["--uds", ""], "--uds"),
        (["--uds", "x.sock"], "--uds and --port both say where to listen"),
        (["--read-timeout", "0"], "--read-timeout"),
        (["--stream-keep-alive", "0"], "--stream-keep-alive"),
        (["--send-timeout", "-1"], "--send-timeout"),
        (["--max-model-len", "1e3"], "--max-model-len"),
        (["--routing", "best"], "--routing"),
        (["--policy", "belady"], "--policy"),
        (["--dtype", "int4"], "--dtype"),
        (["--log-format", "xml"], "--log-format"),
        (["--otlp-endpoint", "localhost:4318"], "--otlp-endpoint"),
        (["--shutdown-timeout", "nan"], "--shutdown-timeout"),
        (["--seed"], "--seed"),
        (["--api-key", "secret", ""], "--api-key"),
        (["--predict-every", "0"], "--predict-every"),
        (["--config", "/nonexistent.yaml"], "/nonexistent.yaml"),
        (["--model", "/nonexistent/model"], "/nonexistent/model"),
        (["--model", "x", "--host", "256.256.256.256"], "256.256.256.256"),
        (["x", "--model", "y"], "MODEL and --model both say what is served"),
    ],
)
def test_mistakes_are_named(capsys: pytest.CaptureFixture[str], arguments: list[str], named: str) -> None:
    assert named in fails(capsys, "--port", "0", *arguments)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("max-num-seqs: many", "--max-num-seqs"),
        ("max-num-seq: 4", "max-num-seq"),
        ("- 4", "mapping"),
        ("a: [", "YAML"),
        ("config: other.yaml", "config"),
        ("port: 70000", "--port is '70000'; expected an integer between"),
        ("api-key: [a, '']", "--api-key"),
        ("port: [1, 2]", "port is a list; expected an integer between 0 and 65535"),
        ("model: {a: 1}", "model is a mapping; expected a text"),
        ("expert-memory: [40%, x]", "expert-memory is a list; expected a share"),
        ("prefix-caching: maybe", "prefix-caching is 'maybe'; expected true or false"),
    ],
)
def test_mistakes_in_the_configuration_file_are_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: str, named: str
) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(content, encoding="utf-8")
    message = fails(capsys, "--config", str(path))
    assert message.startswith(f"error: --config {path}: ")
    assert named in message


def test_mistakes_beside_a_configuration_file_are_not_the_file_s(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text("port: 0\n", encoding="utf-8")
    assert fails(capsys, "--config", str(path), "--seed", "x").startswith("error: --seed is ")


def test_the_model_may_be_named_without_a_flag() -> None:
    assert parse_options(["x", "--seed", "1"]).model == parse_options(["--seed", "1", "x"]).model == "x"


def test_flags_win_over_the_configuration_file(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(
        "model: here\nmax_num_seqs: 3\nseed: 5\napi-key: [a, b]\nexpert-memory: 8 slots\nhost-memory: null\n"
        "prefix-caching: false\n",
        encoding="utf-8",
    )
    options = parse_options(["--config", str(path), "--seed", "6"])
    assert (options.model, options.max_num_seqs, options.seed) == ("here", 3, 6)
    assert not options.prefix_caching
    assert parse_options(["--config", str(path), "--prefix-caching"]).prefix_caching
    assert (options.api_key, options.expert_memory, options.host_memory) == (["a", "b"], "8 slots", "auto")


def test_a_taken_port_is_named_before_loading(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"port {port}" in fails(capsys, "--model", "/nonexistent", "--port", port)


def test_a_trace_that_exists_is_refused_before_loading(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    trace = tmp_path / "trace.npz"
    trace.touch()
    assert f"{trace} exists" in fails(capsys, "--model", "/nonexistent", "--port", "0", "--record-traces", str(trace))


@pytest.mark.parametrize("flags", [["--host", "0.0.0.0"], ["--port", "8000"], ["--host", "x", "--port", "1"]])
def test_one_place_to_listen(capsys: pytest.CaptureFixture[str], tmp_path: Path, flags: list[str]) -> None:
    """By flags, in the file, or one here and the other there; the defaults are no place that somebody named."""
    uds = str(tmp_path / "x.sock")
    wrong = f"--uds and {flags[0]} both say where to listen"
    assert wrong in fails(capsys, "--uds", uds, *flags)
    path = tmp_path / "serve.yaml"
    path.write_text(f"uds: {uds}\n", encoding="utf-8")
    assert wrong in fails(capsys, "--config", str(path), *flags)
    options = parse_options(["--config", str(path), "--model", "x", "--root-path", "/llm/"])
    assert (options.uds, options.host, options.port, options.root_path) == (uds, "127.0.0.1", 8000, "/llm")


def test_help_states_the_defaults_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_status:
        command.main(["--help"])
    assert exit_status.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "(default: 8000)" in text
    assert "None" not in text
    assert "[]" not in text


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("max_num_seqs is 0", "--max-num-seqs is 0"),
        ("expert memory of 0%", "--expert-memory of 0%"),
        ("/x/max_num_seqs/model is missing", "/x/max_num_seqs/model is missing"),
    ],
)
def test_errors_of_the_engine_name_flags(message: str, expected: str) -> None:
    assert as_flags(message) == expected


@pytest.mark.parametrize("timeout", [0.0, 0.3])
def test_shutdown_fails_what_does_not_finish_in_time(timeout: float, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "serve")
    engine = FakeEngine(FakeTokenizer())
    engine.gate.clear()
    worker = EngineWorker(engine, 10)
    app = create_app(Service(("fake",), TextCodec(engine.tokenizer, VOCAB_SIZE, 100), worker))
    answers: list[httpx.Response] = []

    def ask() -> None:
        answers.append(httpx.post(f"{url}/v1/completions", json={"prompt": "hi"}))

    def stop_when_busy() -> None:
        while not engine.running:
            time.sleep(0.005)
        server.should_exit = True

    threads = [threading.Thread(target=target) for target in (ask, stop_when_busy)]

    def start_threads() -> None:
        for thread in threads:
            thread.start()

    with bind("127.0.0.1", 0) as listener:
        url = url_of(listener)
        server = Server(app, worker, timeout, on_ready=start_threads)
        begin = time.monotonic()
        asyncio.run(server.serve([listener]))
    for thread in threads:
        thread.join()
    assert timeout <= time.monotonic() - begin < timeout + 10
    assert answers[0].status_code == 503
    assert answers[0].json()["error"]["message"] == "the server is shutting down"
    assert not engine.running
    told = [message for message in caplog.messages if message.startswith("shut")]
    assert told == [
        f"shutting down: waiting up to {timeout:g} s for 1 request; Ctrl-C again to stop now",
        "shut down without finishing 1 request",
    ]
