"""OpenTelemetry spans, one for each request that the engine was given; the libraries are an extra."""

import os
import time
from typing import TYPE_CHECKING, Any

from starlette.datastructures import Headers
from starlette.types import Scope

from emoe_jax.errors import ConfigError
from serve.telemetry.stats import RequestStats

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

SERVICE = "emoe-jax"
EXPORT_SECONDS = 2
"""What a batch of spans may take, all attempts together: an exit waits for the last ones."""


def span_provider(otlp_endpoint: str | None) -> "TracerProvider | None":
    """What sends spans to a collector's OTLP/HTTP endpoint, in the background; None without one.

    Raises `ConfigError` when the libraries are missing.
    """
    if otlp_endpoint is None:
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise ConfigError("otlp_endpoint needs OpenTelemetry: pip install 'emoe-jax[otel]'") from None
    resource = Resource.create({"service.name": os.environ.get("OTEL_SERVICE_NAME", SERVICE)})
    provider = TracerProvider(resource=resource)
    url = otlp_endpoint.removesuffix("/").removesuffix("/v1/traces") + "/v1/traces"
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(url, timeout=EXPORT_SECONDS)))
    return provider


class Tracing:
    """Writes a request's span when the request is over, as part of the trace that its `traceparent` names."""

    def __init__(self, provider: "TracerProvider", model: str):
        self._tracer = provider.get_tracer(SERVICE)
        self._model = model

    def record(self, scope: Scope, status: int, stats: RequestStats) -> None:
        """Nothing for a request that did not come as far as the engine."""
        from opentelemetry import propagate
        from opentelemetry.trace import SpanKind, Status, StatusCode

        if stats.params is None:
            return
        seconds, end = time.monotonic() - stats.arrived, time.time_ns()
        attributes = {name: value for name, value in self._attributes(scope, stats).items() if value is not None}
        span = self._tracer.start_span(
            "llm_request",
            context=propagate.extract(Headers(scope=scope)),
            kind=SpanKind.SERVER,
            attributes={**attributes, "gen_ai.latency.e2e": seconds, "http.response.status_code": status},
            start_time=end - int(1e9 * seconds),
        )
        if status >= 500 or "error" in stats.finish_reasons:
            span.set_status(Status(StatusCode.ERROR))
        span.end(end)

    def _attributes(self, scope: Scope, stats: RequestStats) -> dict[str, Any]:
        """Names of the GenAI conventions where they have one, and vLLM's; times in seconds. Nothing of any text."""
        params, first = stats.params, stats.first_token_at
        assert params is not None
        waits = [answer.queue_seconds for output in stats.outputs for answer in output.completions]
        return {
            "gen_ai.request.model": self._model,
            "gen_ai.request.id": scope["state"].get("request_id"),
            "gen_ai.request.max_tokens": params.max_tokens,
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
            "gen_ai.request.n": params.n,
            "gen_ai.usage.prompt_tokens": stats.prompt_tokens,
            "gen_ai.usage.completion_tokens": stats.completion_tokens,
            "gen_ai.response.finish_reasons": sorted(stats.finish_reasons),
            "gen_ai.latency.time_in_queue": max((wait for wait in waits if wait is not None), default=None),
            "gen_ai.latency.time_to_first_token": None if first is None else first - stats.arrived,
            "http.route": getattr(scope.get("route"), "path", None),
        }
