"""`emoe bench latency`, `throughput` and `serve`."""

import contextlib
import json
import signal
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from benchmarks.bench.arrivals import arrival_times
from benchmarks.bench.serve import ServeOptions, seen
from benchmarks.bench.target import is_failure
from benchmarks.serving.report import Record
from benchmarks.serving.workload import Job, Sample
from emoe_jax import Engine
from emoe_jax.requests.request import SLO
from serve import emoe
from serve.command.served_state import between
from tests.serve.conftest import running_server
from tests.serve.fake import FakeEngine, FakeTokenizer

STEP = ("--max-num-seqs", "2", "--max-num-batched-tokens", "8", "--max-model-len", "16")
SMALL = (*STEP, "--expert-memory", "4 slots", "--audit-rate", "0", "--json")
"""Few shapes, which are compiled once for both commands."""


class TestInProcess:
    @pytest.fixture(autouse=True)
    def steps_are_compiled_when_they_are_needed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Engine, "warm_up", lambda engine, progress: None)

    def test_latency_is_of_the_batches_that_are_timed(
        self, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        sizes = ("--input-len", "6", "--output-len", "5", "--batch-size", "2", "--num-iters", "2")
        words = [*sizes, "--num-iters-warmup", "1", *SMALL, "--routing", "resident"]
        assert emoe.main(["bench", "latency", str(tiny_checkpoint), *words]) == 0
        numbers = json.loads(capsys.readouterr().out)
        assert (numbers["batch_size"], numbers["iterations"], numbers["routing"]) == (2, 2, "resident")
        assert numbers["resident_share"] == 0.5
        assert 0 < numbers["p50_ttft_s"] < numbers["p50_latency_s"] <= numbers["p99_latency_s"]
        assert 0 < numbers["p50_tpot_s"] < numbers["p50_latency_s"]

    def test_throughput_counts_all_tokens(self, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
        sizes = ("--input-len", "6", "--output-len", "4", "--num-prompts", "5")
        assert emoe.main(["bench", "throughput", str(tiny_checkpoint), *sizes, *SMALL]) == 0
        numbers = json.loads(capsys.readouterr().out)
        assert numbers["max_num_seqs"] == 2
        assert numbers["requests_per_s"] == pytest.approx(5 / numbers["seconds"])
        assert numbers["output_tokens_per_s"] == pytest.approx(20 / numbers["seconds"])
        assert numbers["total_tokens_per_s"] == pytest.approx(50 / numbers["seconds"])

    @pytest.mark.parametrize("command", ["latency", "throughput"])
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["nowhere"], "nowhere"),
            (["--output-len", "0"], "--output-len is '0'; expected an integer of at least 1"),
            (["--max-num-seqs", "0"], "--max-num-seqs is '0'"),
        ],
    )
    def test_a_mistake_is_one_line(
        self, command: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        status = status_of("bench", command, *arguments)
        out, err = capsys.readouterr()
        lines = [line for line in err.splitlines() if not line.startswith("loading: ")]
        assert (status, out, len(lines)) == (2, "", 1)
        assert message in lines[0]


class TestArrivals:
    @pytest.mark.parametrize("process", ["poisson", "gamma", "constant"])
    def test_the_rate_is_kept_on_average(self, process: Any) -> None:
        times = arrival_times(process, 4.0, 8000, 0, 0.5)
        assert times == sorted(times)
        assert len(times) / times[-1] == pytest.approx(4, rel=0.05)

    @pytest.mark.parametrize(("burstiness", "spread"), [(0.25, 2.0), (1.0, 1.0), (4.0, 0.5)])
    def test_burstiness_is_the_shape_of_the_gaps(self, burstiness: float, spread: float) -> None:
        """Gaps of a gamma process vary by one over the root of their shape."""
        gaps = np.diff(arrival_times("gamma", 2.0, 20_000, 1, burstiness))
        assert gaps.std() / gaps.mean() == pytest.approx(spread, rel=0.05)

    def test_without_a_rate_all_come_at_once(self) -> None:
        assert arrival_times("poisson", None, 3, 0, 1.0) == [0.0, 0.0, 0.0]
        assert arrival_times("constant", 2.0, 3, 0, 1.0) == [0.0, 0.5, 1.0]


def record(arrival: float, *token_times: float) -> Record:
    return Record(Job(arrival, "", Sample(0, 9), SLO()), token_times)


def test_goodput_is_of_requests_that_keep_both_objectives() -> None:
    options = ServeOptions(slo_ttft_ms=500, slo_tpot_ms=100)
    records = [
        record(0.0, 0.4, 0.5, 0.6),  # keeps both
        record(1.0, 1.6, 1.7),  # late first token
        record(2.0, 2.1, 2.4),  # slow tokens
        record(3.0, 3.5),  # one token has no time between tokens
        record(3.0),  # failed
    ]
    numbers = seen(records, options)
    assert (numbers["completed"], numbers["output_tokens"], numbers["seconds"]) == (4, 8, pytest.approx(3.5))
    assert numbers["goodput"] == pytest.approx(2 / 3.5)
    assert numbers["slo_attainment"] == 2 / 5
    assert seen(records, ServeOptions())["goodput"] is None
    nothing = seen([record(0.0)], options)
    assert (nothing["completed"], nothing["request_throughput"], nothing["slo_attainment"]) == (0, None, 0)


def test_what_a_server_did_is_counted_between_two_states() -> None:
    def state(wishes: list[list[int]], coverage: float, loads: int, steps: int) -> dict[str, Any]:
        residency = {"wishes": wishes, "coverage": coverage, "loads": {"loads": loads}, "share": 0.5}
        return {"residency": residency, "steps": steps}

    found = between(state([[50, 50]], 0.5, 3, 10), state([[100, 100]], 0.7, 8, 30))
    assert found == {
        "resident_share": 0.5,
        "wishes": 100,
        "hits": 90,
        "coverage": pytest.approx(0.9),
        "loads": 5,
        "steps": 20,
    }
    assert between(None, state([[1]], 1.0, 0, 1)) is None


def status_of(*arguments: str) -> int | str | None:
    try:
        return emoe.main(list(arguments))
    except SystemExit as ended:
        return ended.code


@pytest.fixture(scope="module")
def server() -> Iterator[httpx.Client]:
    with running_server(FakeEngine(FakeTokenizer()), api_keys=["secret"]) as client:
        yield client


@contextlib.contextmanager
def mortal_server(answers: int) -> Iterator[str]:
    """The URL of one that breaks off its next answer and closes its port, as the process does that is killed."""

    class Handler(BaseHTTPRequestHandler):
        left = answers

        def log_message(self, format: str, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            self._send(200, b'{"data": [{"id": "mortal"}]}' if self.path == "/v1/models" else b"{}")

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            event = b'data: {"choices": [{"index": 0, "token_ids": [7]}]}\n\n'
            if Handler.left == 0:
                server.socket.close()
                self._send(200, event)
                return
            Handler.left -= 1
            self._send(200, event + b"data: [DONE]\n\n")

        def _send(self, status: int, content: bytes) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("Hello\nHow are you?\n\n")
    return path


class TestServe:
    @pytest.mark.parametrize(
        "arrivals",
        [
            (),
            ("--arrivals", "closed", "--max-concurrency", "2"),
            ("--request-rate", "200", "--max-concurrency", "1"),
            ("--arrivals", "gamma", "--request-rate", "200"),
            ("--arrivals", "constant", "--request-rate", "200"),
        ],
        ids=" ".join,
    )
    def test_every_request_is_answered(
        self, server: httpx.Client, prompts: Path, arrivals: tuple[str, ...], capsys: pytest.CaptureFixture[str]
    ) -> None:
        load = ("--num-prompts", "5", "--prompts", str(prompts), "--max-tokens", "7", "--api-key", "secret")
        slo = ("--slo-ttft-ms", "60000", "--slo-tpot-ms", "60000")
        assert status_of("bench", "serve", str(server.base_url), *load, *arrivals, *slo, "--json") == 0
        numbers = json.loads(capsys.readouterr().out)
        assert (numbers["model"], numbers["requests"], numbers["completed"]) == ("fake", 5, 5)
        assert (numbers["errors"], numbers["output_tokens"], numbers["slo_attainment"]) == ({}, 35, 1.0)
        assert numbers["goodput"] == pytest.approx(numbers["request_throughput"])
        assert numbers["prompt_tokens"] > 5 * len("Hello")
        assert 0 < numbers["p50_ttft_s"] <= numbers["p50_latency_s"]

    def test_failures_are_counted_by_kind_and_all_failing_is_1(
        self, server: httpx.Client, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = tmp_path / "long.txt"
        path.write_text("x" * 200)
        load = ("--num-prompts", "3", "--prompts", str(path), "--api-key", "secret")
        assert status_of("bench", "serve", str(server.base_url), *load, "--json") == 1
        numbers = json.loads(capsys.readouterr().out)
        assert numbers["errors"] == {"HTTP 400 (context_length_exceeded)": 3}
        assert numbers["completed"] == 0
        assert status_of("bench", "serve", str(server.base_url), *load) == 1
        assert "errors: HTTP 400" in capsys.readouterr().out

    def test_a_server_that_dies_half_way_is_1_and_one_line(
        self, prompts: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with mortal_server(answers=3) as url:
            load = ("--num-prompts", "6", "--prompts", str(prompts), "--arrivals", "closed", "--max-concurrency", "1")
            status = status_of("bench", "serve", url, *load, "--max-tokens", "4", "--num-warmups", "0")
        out, err = capsys.readouterr()
        assert "3 of 6 requests answered" in out
        assert (status, err.count("\n")) == (1, 1)
        assert err.startswith(f"error: the server at {url} failed, or died, under 3 of 6 requests (")

    @pytest.mark.parametrize(
        ("kind", "expected"),
        [
            ("connection refused", True),
            ("stream cut off", True),
            ("error in the stream", True),
            ("HTTP 500 (internal_error)", True),
            ("HTTP 503 (unavailable)", True),
            ("HTTP 503 (queue_full)", False),
            ("HTTP 429", False),
            ("no tokens", False),
        ],
    )
    def test_a_refusal_is_no_failure_of_the_server(self, kind: str, expected: bool) -> None:
        assert is_failure(kind) is expected

    @pytest.mark.parametrize("wait_for", [0, 2])
    def test_ctrl_c_reports_what_was_measured(
        self, prompts: Path, wait_for: int, capsys: pytest.CaptureFixture[str]
    ) -> None:
        engine = FakeEngine(FakeTokenizer(), step_seconds=0.02)
        ended = threading.Event()

        def interrupt() -> None:
            while len(engine.requests) < 1 + wait_for and not ended.wait(0.005):
                pass
            signal.raise_signal(signal.SIGINT)

        with running_server(engine) as client:
            load = ("--num-prompts", "50", "--prompts", str(prompts), "--arrivals", "closed", "--max-concurrency", "1")
            words = ("bench", "serve", str(client.base_url), *load, "--max-tokens", "5", "--num-warmups", "0", "--json")
            thread = threading.Thread(target=interrupt)
            thread.start()
            try:
                status = status_of(*words)
            finally:
                ended.set()
                thread.join()
        out, err = capsys.readouterr()
        assert (status, err.count("\n")) == (130, 1)
        if wait_for:
            numbers = json.loads(out)
            assert (numbers["interrupted"], numbers["completed"]) == (True, wait_for)
            assert err == f"interrupted: {wait_for} of 50 requests had ended\n"
        else:
            assert (out, err) == ("", "interrupted before a request was answered\n")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["http://127.0.0.1:9"], "no server answers at http://127.0.0.1:9"),
            (["{url}"], "answers /v1/models with 401; give its --api-key"),
            (["localhost:8000"], "'localhost:8000' is no address of a server"),
            (["{url}", "--prompts", "missing.txt"], "missing.txt: No such file"),
            (["{url}", "--arrivals", "closed"], "--arrivals closed needs --max-concurrency"),
            (
                ["{url}", "--arrivals", "closed", "--max-concurrency", "2", "--request-rate", "1"],
                "has no --request-rate",
            ),
            (["{url}", "--arrivals", "gamma"], "--arrivals gamma needs a --request-rate"),
            (["{url}", "--request-rate", "0"], "--request-rate is '0'"),
            (["{url}", "--num-promts", "3"], "the nearest known one is '--num-prompts'"),
        ],
    )
    def test_a_mistake_is_one_line(
        self, server: httpx.Client, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        status = status_of("bench", "serve", *(word.format(url=server.base_url) for word in arguments))
        out, err = capsys.readouterr()
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert message in err
