"""Spans of requests, through the SDK's in-memory exporter."""

import builtins
import http.server
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from emoe_jax import ConfigError
from serve.telemetry.tracing import Tracing, span_provider
from tests.serve.conftest import running_server
from tests.serve.events import events_of
from tests.serve.fake import FakeEngine, FakeTokenizer
from tests.serve.test_server import ask, wait_until

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Collected:
    """A server, and the spans it has written."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracing = Tracing(provider, "fake")
        self.engine = FakeEngine(FakeTokenizer(), step_seconds=0.01)

    def one(self) -> tuple[ReadableSpan, dict[str, Any]]:
        wait_until(lambda: bool(self.exporter.get_finished_spans()))
        (span,) = self.exporter.get_finished_spans()
        return span, dict(span.attributes or {})


@pytest.fixture
def collected() -> Collected:
    return Collected()


@pytest.fixture
def client(collected: Collected) -> Iterator[httpx.Client]:
    with running_server(collected.engine, tracing=collected.tracing) as client:
        yield client


def test_a_request_is_one_span_of_its_caller_s_trace(client: httpx.Client, collected: Collected) -> None:
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "r-1"}
    body = {"prompt": "hi", "n": 2, "max_tokens": 4, "temperature": 0.5, "top_p": 0.9}
    assert client.post("/v1/completions", json=body, headers=headers).status_code == 200
    span, attributes = collected.one()
    assert span.context is not None
    assert span.parent is not None
    assert (f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}") == (TRACE, PARENT)
    expected = {
        "gen_ai.request.model": "fake",
        "gen_ai.request.id": "r-1",
        "gen_ai.request.max_tokens": 4,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.request.n": 2,
        "gen_ai.usage.prompt_tokens": 3,
        "gen_ai.usage.completion_tokens": 8,
        "gen_ai.response.finish_reasons": ("length",),
        "gen_ai.latency.time_in_queue": 0.25,
        "http.route": "/v1/completions",
        "http.response.status_code": 200,
    }
    assert {name: attributes[name] for name in expected} == expected
    assert 0 < attributes["gen_ai.latency.time_to_first_token"] < attributes["gen_ai.latency.e2e"] < 10
    assert span.start_time is not None
    assert span.end_time is not None
    assert (span.end_time - span.start_time) / 1e9 == pytest.approx(attributes["gen_ai.latency.e2e"], abs=1e-6)
    assert span.status.is_ok


@pytest.mark.parametrize("traceparent", [None, "", "nonsense", f"00-{'0' * 32}-{PARENT}-01"])
def test_streams_and_traces_of_their_own(client: httpx.Client, collected: Collected, traceparent: str | None) -> None:
    client.headers.update({} if traceparent is None else {"traceparent": traceparent})
    events_of(client, "/v1/completions", prompt="hi", max_tokens=3, stream=True)
    span, attributes = collected.one()
    assert span.parent is None
    assert attributes["gen_ai.usage.completion_tokens"] == 3


def test_failures_are_errors_and_what_was_refused_is_no_span(client: httpx.Client, collected: Collected) -> None:
    assert ask(client, max_tokens=-1).status_code == 400
    assert client.get("/health").status_code == 200
    collected.engine.failures = [RuntimeError()]
    assert ask(client).status_code == 500
    span, attributes = collected.one()
    assert not span.status.is_ok
    assert attributes["http.response.status_code"] == 500


def test_nothing_without_an_endpoint_and_a_clear_word_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    assert span_provider(None) is None
    real_import = builtins.__import__

    def no_opentelemetry(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("opentelemetry"):
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_opentelemetry)
    with pytest.raises(ConfigError, match=r"otlp_endpoint needs OpenTelemetry: pip install 'emoe-jax\[otel\]'"):
        span_provider("http://localhost:4318")


@pytest.mark.parametrize("path", ["", "/", "/v1/traces"])
def test_spans_reach_a_collector(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTEL_SERVICE_NAME", raising=False)
    received: list[tuple[str, bytes]] = []

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Collector) as collector:
        threading.Thread(target=collector.serve_forever).start()
        try:
            provider = span_provider(f"http://127.0.0.1:{collector.server_port}{path}")
            assert provider is not None
            with running_server(FakeEngine(FakeTokenizer()), tracing=Tracing(provider, "fake")) as client:
                assert ask(client).status_code == 200
            provider.shutdown()
        finally:
            collector.shutdown()
    ((at, body),) = received
    assert at == "/v1/traces"
    for expected in (b"emoe-jax", b"llm_request", b"gen_ai.request.model"):
        assert expected in body
