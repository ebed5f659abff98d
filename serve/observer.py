"""ASGI middleware around everything: gives each request its `RequestStats`."""

from starlette.types import ASGIApp, Receive, Scope, Send

from serve.metrics import RequestMetrics
from serve.stats import RequestStats


class Observer:
    """Routes find the stats as `request.state.stats`."""

    def __init__(self, app: ASGIApp, metrics: RequestMetrics):
        self.app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope.setdefault("state", {})["stats"] = RequestStats(self._metrics)
        await self.app(scope, receive, send)
