"""What answers while the model loads: 503 to everything."""

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator, Sequence

import uvicorn
from fastapi import Request
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from serve.errors import ApiError, error_response
from serve.http.body import BodyReader
from serve.http.guard import Guard
from serve.http.protocol import HttpConfig

RETRY_AFTER_SECONDS = 5


class Lobby:
    """An ASGI application that has no engine yet. It reads bodies, so that clients see its answer, and keeps none."""

    def __init__(self, read_timeout: float):
        self._bodies = BodyReader(read_timeout)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = ApiError(
            503, "the model is being loaded", code="loading", headers={"retry-after": str(RETRY_AFTER_SECONDS)}
        )
        try:
            await self._bodies.read(Request(scope, receive).stream())
        except ApiError as refusal:
            error = refusal
        except ClientDisconnect:
            return
        await error_response(error, scope["path"])(scope, receive, send)


@contextlib.contextmanager
def open_lobby(
    listener: socket.socket, hosts: Sequence[str], *, read_timeout: float, send_timeout: float
) -> Iterator[None]:
    """Answer on `listener`, from a thread, until the context ends; connections that come later wait in its backlog."""
    config = HttpConfig(
        Guard(Lobby(read_timeout), (), hosts),
        read_timeout=read_timeout,
        send_timeout=send_timeout,
        lifespan="off",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)
    own = listener.dup()  # the server closes it at its end
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([own])), name="lobby", daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.should_exit = True
        thread.join()
