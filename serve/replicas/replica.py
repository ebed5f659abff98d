"""A replica under Ray Serve: the engine, and the application called without a socket."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import FastAPI
from starlette.types import Message

from serve.http.hosts import hosts_of
from serve.options import ServerOptions
from serve.replicas.call import ANSWERS, ATTAINED, GOAL, REPLICA, SERVES, Call
from serve.start import keep_compilations, load, make_app, make_worker
from serve.telemetry.logs import configure_logging
from serve.worker import EngineWorker

PARTING_SECONDS = 2.0
"""What the application gets to abort a request whose client is gone."""


class LocalServer:
    """An application and its engine, whose thread starts on the event loop of the first call."""

    def __init__(self, app: FastAPI, worker: EngineWorker, name: str):
        """`name` is told to clients in each answer."""
        self._app, self._worker, self._name = app, worker, name
        self._lifespan = contextlib.AsyncExitStack()
        self._starting = asyncio.Lock()
        self._started = False
        self._kept = self._answered = 0

    @classmethod
    def load(cls, options: ServerOptions, name: str) -> "LocalServer":
        """Loads the model. Raises `EmoeError` if it cannot be served."""
        configure_logging(options.log_format)
        keep_compilations()
        loaded = load(options)
        engine, worker = loaded.engine, make_worker(options, loaded)
        address = socket.getaddrinfo(options.host, None)[0][4][0]
        return cls(make_app(options, engine, worker, hosts_of(str(address), options.allowed_hosts)), worker, name)

    async def answer(self, call: Call) -> AsyncGenerator[Message, None]:
        """The application's ASGI messages: the status with its headers, then the body in pieces."""
        await self._start()
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        requests: list[Message] = [{"type": "http.request", "body": call.body, "more_body": False}]
        gone = asyncio.Event()

        async def receive() -> Message:
            if requests:
                return requests.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def run() -> None:
            try:
                await self._app(scope_of(call), receive, messages.put)
            finally:
                messages.put_nowait(None)

        task = asyncio.ensure_future(run())
        try:
            while (message := await messages.get()) is not None:
                if message["type"] == "http.response.start":
                    message["headers"] = [*message["headers"], (REPLICA, self._name.encode())]
                yield message
            await task
        finally:
            gone.set()
            if not task.done():
                await asyncio.wait({task}, timeout=PARTING_SECONDS)
                task.cancel()

    async def published(self) -> dict[str, Any]:
        """By task, how much of its routing the resident experts cover; and coverage, queue and answers so far, for the
        dashboard.
        """
        state = await self._state()
        residency, scheduler = state["residency"], state["scheduler"]
        return {
            SERVES: state["planner"].get("serves", {}),
            "coverage": state["planner"].get("coverage_recent"),
            "resident_share": residency["share"],
            "running": scheduler["running"],
            "waiting": scheduler["waiting"],
            "answers": scheduler["slo"]["ended"],
        }

    async def deadlines(self, goal: float) -> dict[str, float]:
        """Answers with a deadline since the last call, those of them that kept it, and the share that is the goal."""
        counts = (await self._state())["scheduler"]["slo"]
        kept, answered = counts["attained"] - self._kept, counts["with_slo"] - self._answered
        self._kept, self._answered = counts["attained"], counts["with_slo"]
        return {ATTAINED: float(kept), ANSWERS: float(answered), GOAL: goal}

    def check_health(self) -> None:
        """Raises `RuntimeError` once the engine does not work any more."""
        if self._started and not self._worker.healthy:
            raise RuntimeError("the engine is not healthy")

    async def _state(self) -> dict[str, Any]:
        await self._start()
        return await self._worker.call(lambda engine: engine.state())

    async def _start(self) -> None:
        async with self._starting:
            if not self._started:
                await self._lifespan.enter_async_context(self._app.router.lifespan_context(self._app))
                self._started = True


def scope_of(call: Call) -> dict[str, Any]:
    """The request as ASGI has it."""
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": call.method,
        "scheme": "http",
        "path": call.path,
        "raw_path": call.raw_path,
        "root_path": "",
        "query_string": call.query,
        "headers": call.headers,
        "client": call.client,
        "server": None,
        "state": {"fleet": call.fleet},
    }
