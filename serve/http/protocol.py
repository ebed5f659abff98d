"""HTTP/1.1 on one connection, and what it does about clients that stall or send what is not HTTP."""

import asyncio
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from serve.errors import ApiError, error_response

KEEP_ALIVE = 75
"""Seconds between an answer and the next request. Longer than clients keep idle connections themselves (httpx 5,
aiohttp 15, proxies 60): one that is closed while a request is on its way fails that request.
"""


class HttpConfig(uvicorn.Config):
    """uvicorn's, with the seconds that a client may take to send the head of a request, and to read on in an answer."""

    def __init__(self, app: Any, *, read_timeout: float, send_timeout: float, **settings: Any):
        super().__init__(app, http=HttpProtocol, ws="none", timeout_keep_alive=KEEP_ALIVE, **settings)
        self.read_timeout = read_timeout
        self.send_timeout = send_timeout


class HttpProtocol(H11Protocol):
    """uvicorn's, which by itself waits for ever.

    A connection is closed after `read_timeout` seconds without a whole request head, however its bytes trickle in, or
    without the rest of a request that is answered already. A connection that sends nothing after a whole request is
    closed after `KEEP_ALIVE` seconds. A connection whose client has taken nothing of an answer is closed after
    `send_timeout` seconds. Bodies have a timeout of their own where they are read.
    """

    _reading: asyncio.TimerHandle | None = None
    _sending: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        """As uvicorn's. From now on the client has `read_timeout` seconds to send a request head."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(0)  # so that writing is paused whenever there is something left to send
        self._watch_reading()

    def data_received(self, data: bytes) -> None:
        """As uvicorn's, and looks whether a whole request head or body has come."""
        super().data_received(data)
        self._watch_reading()

    def on_response_complete(self) -> None:
        """As uvicorn's. A body that is still to come has `read_timeout` seconds."""
        is_half_sent = self.conn.their_state is h11.SEND_BODY  # it was answered without its body
        super().on_response_complete()
        if is_half_sent:
            self._watch_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        """As uvicorn's, and stops both timers."""
        super().connection_lost(exc)
        for timer in (self._reading, self._sending):
            if timer is not None:
                timer.cancel()

    def pause_writing(self) -> None:
        """As uvicorn's. From now on the client has `send_timeout` seconds to take something."""
        super().pause_writing()
        self._watch_sending()

    def resume_writing(self) -> None:
        """As uvicorn's, and stops the timer: the client has taken all there was."""
        super().resume_writing()
        if self._sending is not None:
            self._sending.cancel()

    def send_400_response(self, msg: str) -> None:
        """In the shape of all errors; where an answer has begun, the connection just ends."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            response = error_response(ApiError(400, "the request is not valid HTTP/1.1"))
            headers = [*response.raw_headers, (b"connection", b"close")]
            for event in (
                h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
                h11.Data(data=bytes(response.body)),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        if self.cycle is not None:  # the route must not write any more
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()

    def _should_upgrade(self) -> bool:
        """Never, and without uvicorn's advice to install something."""
        return False

    def _watch_reading(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            if self._reading is not None:
                self._reading.cancel()
                self._reading = None
        elif self._reading is None:
            self._reading = self.loop.call_later(self._config.read_timeout, self.transport.close)

    def _watch_sending(self) -> None:
        left = self.transport.get_write_buffer_size()

        def check() -> None:
            if self.transport.get_write_buffer_size() < left:
                self._watch_sending()
            else:
                self.transport.abort()

        self._sending = self.loop.call_later(self._config.send_timeout, check)

    @property
    def _config(self) -> HttpConfig:
        assert isinstance(self.config, HttpConfig)
        return self.config
