"""Reading a JSON body: bounded, checked, and never a reason for a 5xx."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pydantic_core
from fastapi import Request
from fastapi.responses import Response
from fastapi.routing import APIRoute

from serve.errors import RETRY_AFTER_SECONDS, ApiError

MAX_BODY_BYTES = 8 * 2**20
MAX_DISCARDED_BYTES = 4 * MAX_BODY_BYTES
MAX_MARKS = 300_000
"""Commas, colons, brackets and quotes of a body: enough for a prompt of 2**18 token ids. What more would build holds up
the event loop for longer than streams should stand still.
"""
BRACKET_MARKS = 10
"""How many an opening bracket counts for: lists and objects are what costs most, by the garbage collector's visits."""
NO_MARKS = bytes(set(range(256)) - set(b',:[{"'))
SMALL_BYTES = 2**16
MAX_HELD_BYTES = 2**28
"""Of bodies above `SMALL_BYTES` that are still coming in, all together."""
CLOSE = {"connection": "close"}
RETRY = {"retry-after": str(RETRY_AFTER_SECONDS), **CLOSE}


class BodyReader:
    """Reads bodies, each within `timeout` seconds, and bounds what they take together while clients send them."""

    def __init__(self, timeout: float):
        self._timeout = timeout
        self._held = 0

    async def read(self, stream: AsyncIterator[bytes]) -> bytes:
        """Raises `ApiError` for what is too large, too slow, or has too many marks."""
        body = bytearray()
        marks = Marks()
        size = held = 0
        try:
            async with asyncio.timeout(self._timeout):
                async for chunk in stream:
                    size += len(chunk)
                    if size > MAX_BODY_BYTES or marks.count > MAX_MARKS:
                        # Read on without keeping anything: closing early would reset the connection before the
                        # client has seen the answer.
                        body.clear()
                        if size > MAX_DISCARDED_BYTES:
                            break
                        continue
                    body += chunk
                    marks.add(chunk)
                    if len(body) > SMALL_BYTES:
                        self._held += len(body) - held
                        held = len(body)
                        if self._held > MAX_HELD_BYTES:
                            raise ApiError(503, "too many large requests at once", code="overloaded", headers=RETRY)
        except TimeoutError:
            message = f"the request body did not come within {self._timeout:g} seconds"
            raise ApiError(408, message, code="timeout", headers=CLOSE) from None
        finally:
            self._held -= held
        if size > MAX_BODY_BYTES:
            message = f"the request body is larger than {MAX_BODY_BYTES} bytes"
            raise ApiError(413, message, code="body_too_large", headers=CLOSE)
        if marks.count > MAX_MARKS:
            raise ApiError(413, "the request body has too many values", code="body_too_large", headers=CLOSE)
        return bytes(body)


class Marks:
    """Counts the commas, colons, opening brackets and quotes of JSON that comes in pieces; texts may hold any."""

    def __init__(self) -> None:
        self.count = 0
        self._in_text = False
        self._escape = b""

    def add(self, piece: bytes) -> None:
        """Count the marks of the next piece into `count`. A piece may end within a text or an escape."""
        piece = (self._escape + piece).replace(b"\\\\", b"")
        self._escape = b"\\" if piece.endswith(b"\\") else b""  # of what the next piece begins with
        piece = piece.removesuffix(b"\\").replace(b'\\"', b"")
        parts = piece.translate(None, NO_MARKS).split(b'"')
        outside = b"".join(parts[self._in_text :: 2])
        brackets = outside.count(b"[") + outside.count(b"{")
        self.count += len(parts) - 1 + len(outside) + (BRACKET_MARKS - 1) * brackets
        self._in_text ^= len(parts) % 2 == 0


class JsonRequest(Request):
    """A request whose body is a JSON object, read by the app's `BodyReader`."""

    async def body(self) -> bytes:
        """The whole body, read once. Raises `ApiError` 415 for another content type, and as `BodyReader.read` does."""
        if not hasattr(self, "_body"):
            content_type = self.headers.get("content-type", "").partition(";")[0].strip().lower()
            if content_type != "application/json":
                raise ApiError(
                    415, f"the content type is {content_type[:40]!r}; expected application/json", param="content-type"
                )
            self._body = await self.app.state.body_reader.read(self.stream())
        return self._body

    async def json(self) -> Any:
        """The parsed body. Raises `ApiError` 400 where it is not UTF-8 or not JSON; NaN and Infinity are not JSON."""
        body = await self.body()
        try:
            body.decode()
            return pydantic_core.from_json(body, allow_inf_nan=False)
        except UnicodeDecodeError as error:
            message = f"the request body is not UTF-8: {error.reason} at byte {error.start}"
            raise ApiError(400, message, code="invalid_json") from None
        except ValueError as error:
            raise ApiError(400, f"the request body is not valid JSON: {error}", code="invalid_json") from None


class JsonRoute(APIRoute):
    """A route that reads its body through `JsonRequest`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """As FastAPI's, but the handler gets a `JsonRequest`."""
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            return await handler(JsonRequest(request.scope, request.receive))

        return handle
