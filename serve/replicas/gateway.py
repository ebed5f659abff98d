"""The gateway under Ray Serve: forwards requests to replicas, and tries again where that is safe."""

import logging
from collections.abc import AsyncIterator, Mapping
from typing import Any

import pydantic_core
from ray.exceptions import RayActorError  # pyright: ignore[reportMissingImports]
from ray.serve.exceptions import BackPressureError  # pyright: ignore[reportMissingImports]
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator  # pyright: ignore[reportMissingImports]
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Message

from serve.errors import MESSAGES, ErrorResponse, describe, error_response, messages_error
from serve.http.body import BodyReader
from serve.refusals import QueueFull, Unavailable
from serve.replicas.call import REPLICA, TASK, Call
from serve.stream import sse

log = logging.getLogger("serve")

REQUEST_ID = b"x-request-id"
"""Ray's proxy sends it itself: the client's, or the one that it made up and passed on."""
ATTEMPTS = 3
"""Replicas that a request is given to, should one after the other die before its answer began."""


class Forwarder:
    """Has replicas answer requests. An answer begins for the client with the first piece of its body: until then the
    request is tried again if the replica dies. A stream that has begun ends with an error event.
    """

    def __init__(self, replicas: DeploymentHandle, read_timeout: float):
        self._replicas = replicas.options(method_name="answer", stream=True)
        self._bodies = BodyReader(read_timeout)

    async def answer(self, request: Request) -> Response:
        """The answer to one request."""
        path = request.scope["path"]
        try:
            call = call_of(request, await self._bodies.read(request.stream()))
            head, first, rest = await self._begin(call)
        except ClientDisconnect:
            return Response(status_code=499)  # there is no reader
        except BackPressureError:
            return error_response(QueueFull("the replicas take no more requests"), path)
        except Exception as error:
            return error_response(error, path)
        response = StreamingResponse(_pieces(first, rest, head, path), head["status"])
        response.raw_headers = [header for header in head["headers"] if header[0] != REQUEST_ID]
        return response

    async def _begin(self, call: Call) -> tuple[Message, Message, DeploymentResponseGenerator]:
        """The head of an answer, the first piece of its body, and what brings the others."""
        for attempt in range(ATTEMPTS):
            stream: Any = self._replicas.remote(call)
            try:
                return await anext(stream), await anext(stream), stream
            except RayActorError:
                log.warning("a replica died before its answer began: attempt %d of %d", attempt + 1, ATTEMPTS)
            except BaseException:
                stream.cancel()
                raise
        raise Unavailable(f"{ATTEMPTS} replicas died before they answered")


def call_of(request: Request, body: bytes) -> Call:
    """The request, with what the router goes by."""
    headers = [(bytes(name), bytes(value)) for name, value in request.scope["headers"]]
    by_name = dict(headers)
    client = request.scope.get("client")
    return Call(
        request.method,
        request.scope["path"],
        request.scope.get("raw_path") or request.scope["path"].encode(),
        request.scope["query_string"],
        headers,
        body,
        None if client is None else (client[0], client[1]),
        task_of(by_name, body),
        by_name[REPLICA].decode("latin-1") if REPLICA in by_name else None,
    )


def task_of(headers: Mapping[bytes, bytes], body: bytes) -> str | None:
    """The task that a request names, as the server finds it: in the body, else in the header. What is wrong with either
    is for the server to say.
    """
    if b'"emoe"' in body:
        try:
            task = pydantic_core.from_json(body)["emoe"]["task"]
        except (ValueError, TypeError, KeyError):
            task = None
        if isinstance(task, str):
            return task
    return headers[TASK].decode("latin-1") if TASK in headers else None


async def _pieces(first: Message, rest: DeploymentResponseGenerator, head: Message, path: str) -> AsyncIterator[bytes]:
    """The body. Whatever ends it early ends the replica's work, too."""
    messages: Any = rest
    message = first
    try:
        while True:
            yield message.get("body", b"")
            if not message.get("more_body"):
                return
            message = await anext(messages)
    except RayActorError:
        log.warning("a replica died while it answered")
        if not _is_stream(head):
            raise  # the connection is cut, which tells the client that the body is not whole
        yield died_event(path)
    finally:
        rest.cancel()


def _is_stream(head: Message) -> bool:
    kind = next((value for name, value in head["headers"] if name.lower() == b"content-type"), b"")
    return kind.startswith(b"text/event-stream")


def died_event(path: str) -> bytes:
    """The last event of a stream whose replica died, in the shape of the path's API."""
    status, body, _ = describe(Unavailable("the replica that answered has died"))
    if path.rstrip("/").endswith(MESSAGES):
        return sse(messages_error(status, body).model_dump_json(), "error")
    return sse(ErrorResponse(error=body).model_dump_json())
