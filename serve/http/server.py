"""The listening socket and the uvicorn server that drains before it stops."""

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn
from fastapi import FastAPI

from emoe_jax.errors import ConfigError
from serve.http.protocol import HttpConfig
from serve.worker import EngineWorker

log = logging.getLogger("serve")

FORCED_SECONDS = 2
"""What connections get after the drain to send their last bytes before they are cut."""


def bind(host: str, port: int) -> socket.socket:
    """A listening socket: a taken port shows before the model is loaded, not after."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}: {error.strerror}") from None
    listener = socket.socket(family, kind, proto)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()  # of two servers that are bound to one port only one may
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on {host} port {port}: {error.strerror}") from None
    return listener


def url_of(listener: socket.socket) -> str:
    """The address for people: `http://host:port`, IPv6 in brackets, or `unix:PATH`."""
    if listener.family == socket.AF_UNIX:
        return f"unix:{listener.getsockname()}"
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """SIGINT or SIGTERM: no new connections, running requests get `shutdown_timeout` seconds, the rest get a 503.

    A second signal ends the wait, with the same 503; a third cuts connections.
    """

    def __init__(
        self,
        app: FastAPI,
        worker: EngineWorker,
        shutdown_timeout: float,
        on_ready: Callable[[], None],
        *,
        read_timeout: float = 30.0,
        send_timeout: float = 60.0,
    ):
        config = HttpConfig(
            app,
            read_timeout=read_timeout,
            send_timeout=send_timeout,
            log_config=None,  # through the root logger, like everything
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=int(shutdown_timeout) + FORCED_SECONDS,
        )
        super().__init__(config)
        self._worker = worker
        self._shutdown_timeout = shutdown_timeout
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, then `on_ready` is called: the sockets are open."""
        await super().startup(sockets)
        self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, while the worker drains for up to `shutdown_timeout` seconds. Logs how many were cut off."""
        if self._worker.requests:
            log.info(
                "shutting down: waiting up to %g s for %s; Ctrl-C again to stop now",
                self._shutdown_timeout,
                _count(self._worker.requests),
            )
        else:
            log.info("shutting down")
        drain = asyncio.ensure_future(self._worker.drain(self._shutdown_timeout))
        try:
            await super().shutdown(sockets)
        finally:
            cut = drain.result() if drain.done() else 0
            drain.cancel()
            log.info("shut down" + (f" without finishing {_count(cut)}" if cut else ""))

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, but a drained server exits with status 0 instead of dying of the signal."""
        handled = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in handled}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal asks for the end, the second ends the wait, and the third cuts connections."""
        if self.should_exit:
            self.force_exit = self._worker.hurried
            self._worker.hurried = True
        self.should_exit = True


def _count(requests: int) -> str:
    return f"{requests} request{'s' * (requests != 1)}"
