"""Reading a JSON body: bounded, checked, and never a reason for a 5xx."""

from collections.abc import Callable, Coroutine
from typing import Any

import pydantic_core
from fastapi import Request
from fastapi.responses import Response
from fastapi.routing import APIRoute

from serve.errors import ApiError

MAX_BODY_BYTES = 8 * 2**20
MAX_DISCARDED_BYTES = 4 * MAX_BODY_BYTES


class JsonRequest(Request):
    """A request whose body is a JSON object of at most `MAX_BODY_BYTES`."""

    async def body(self) -> bytes:
        if not hasattr(self, "_body"):
            self._body = await self._read()
        return self._body

    async def _read(self) -> bytes:
        content_type = self.headers.get("content-type", "").partition(";")[0].strip().lower()
        if content_type != "application/json":
            raise ApiError(415, "the content type must be application/json", param="content-type")
        chunks: list[bytes] = []
        size = 0
        async for chunk in self.stream():
            size += len(chunk)
            if size <= MAX_BODY_BYTES:
                chunks.append(chunk)
            elif size > MAX_DISCARDED_BYTES:
                break
            else:
                # Read on without keeping anything: closing early would reset the connection before the client
                # has seen the answer.
                chunks.clear()
        if size > MAX_BODY_BYTES:
            raise ApiError(413, f"the request body is larger than {MAX_BODY_BYTES} bytes", code="body_too_large")
        return b"".join(chunks)

    async def json(self) -> Any:
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
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            return await handler(JsonRequest(request.scope, request.receive))

        return handle
