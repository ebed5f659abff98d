"""ASGI middleware around everything: gives each request its `RequestStats`, traces and logs it when it is over."""

import logging
import time
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.service import emoe_of
from serve.telemetry.metrics import RequestMetrics
from serve.telemetry.stats import RequestStats
from serve.telemetry.tracing import Tracing

log = logging.getLogger("serve.requests")


class Observer:
    """Routes find the stats as `request.state.stats`. Reads that succeed are not logged: some come every second."""

    def __init__(self, app: ASGIApp, metrics: RequestMetrics, tracing: Tracing | None):
        self.app = app
        self._tracing = tracing
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        stats = RequestStats(self._metrics)
        scope.setdefault("state", {})["stats"] = stats
        status = 500  # unless a route answers

        async def observed_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, observed_send)
        finally:
            if self._tracing is not None:
                self._tracing.record(scope, status, stats)
            if log.isEnabledFor(logging.INFO) and (scope["method"] != "GET" or status >= 400):
                log.info("request", extra={"fields": log_fields(scope, status, stats)})


def log_fields(scope: Scope, status: int, stats: RequestStats) -> dict[str, Any]:
    """What the log says of a request: nothing that was asked or answered."""
    first = stats.first_token_at
    fields = {
        "request_id": scope["state"].get("request_id"),
        "method": scope["state"].get("method", scope["method"]),
        "route": getattr(scope.get("route"), "path", None),
        "status": status,
        "latency_ms": _milliseconds(time.monotonic() - stats.arrived),
    }
    if stats.finish_reasons:
        fields |= {
            "prompt_tokens": stats.prompt_tokens,
            "completion_tokens": stats.completion_tokens,
            "ttft_ms": None if first is None else _milliseconds(first - stats.arrived),
            "finish_reason": ",".join(sorted(stats.finish_reasons)),
        }
    if stats.outputs:
        fields |= emoe_of(stats.outputs).model_dump()
    return fields


def _milliseconds(seconds: float) -> float:
    return round(1e3 * seconds, 3)
