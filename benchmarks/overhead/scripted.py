"""The real HTTP server over an engine that computes nothing: a token per sequence and period, its text the time."""

import asyncio
import multiprocessing.connection
import time
from collections.abc import Callable
from typing import Any

import uvicorn

from emoe_jax.engine.vitals import Vitals
from emoe_jax.requests.contract import RoutingContract
from emoe_jax.requests.request import Completion, Delta, RequestOutput, SamplingParams
from serve.app import create_app
from serve.http.server import bind, url_of
from serve.service import Service
from serve.text import TextCodec
from serve.worker import EngineWorker

MAX_MODEL_LEN = 1 << 20


class ScriptedEngine:
    """Gives every running sequence a token each `period` seconds. A token's text is when the engine made it."""

    vitals = Vitals(None, (), compiling=False)

    def __init__(self, period: float):
        self._period = period
        self._due = 0.0
        self._running: dict[str, tuple[RequestOutput, int]] = {}

    def add_request(
        self,
        request_id: str,
        prompt: str | list[int],
        params: SamplingParams,
        *,
        task: str | None = None,
        routing: RoutingContract | None = None,
        tolerance: float | None = None,
        slo: Any = None,
        arrival: float | None = None,
        cache_salt: str | None = None,
    ) -> list[int]:
        assert isinstance(prompt, list)
        output = RequestOutput(request_id, prompt, [Completion(0)], task, routing or "resident")
        self._running[request_id] = output, params.max_tokens
        return prompt

    def has_work(self) -> bool:
        return bool(self._running)

    def on_staged(self, call: Callable[[], None]) -> None:
        """Nothing is ever staged."""

    def step(self) -> list[Delta]:
        self._due = max(self._due + self._period, time.monotonic())
        time.sleep(max(0.0, self._due - time.monotonic()))
        now = f"{time.monotonic():.6f} "
        deltas = []
        for request_id, (output, max_tokens) in self._running.items():
            completion = output.completions[0]
            if completion.finish_reason is None:
                completion.token_ids.append(5)
                if len(completion.token_ids) == max_tokens:
                    completion.finish_reason = "length"
                deltas.append(Delta(request_id, 0, now, (5,), (), completion.finish_reason))
        return deltas

    def output(self, request_id: str) -> RequestOutput:
        return self._running[request_id][0]

    def pop(self, request_id: str) -> RequestOutput:
        return self._running.pop(request_id)[0]

    def state(self) -> dict[str, Any]:
        return {}


def run_server(period: float, ready: multiprocessing.connection.Connection) -> None:
    """Serve until the process is ended; the URL goes to `ready` before the server listens for long."""
    worker = EngineWorker(ScriptedEngine(period), 1024)
    app = create_app(Service(("scripted",), TextCodec(None, 100, MAX_MODEL_LEN), worker))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, ws="none"))
    with bind("127.0.0.1", 0) as listener:
        listener.listen()
        ready.send(url_of(listener))
        asyncio.run(server.serve([listener]))
