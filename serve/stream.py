"""Server-sent events of a running generation."""

import logging
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol, TypeVar

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from emoe_jax.requests.request import RequestOutput
from serve.answers import EmoeAnswer, Usage
from serve.errors import ErrorBody, ErrorResponse, describe
from serve.failures import early_end
from serve.generation import Generation, Update
from serve.schema import StreamOptions
from serve.service import emoe_of

log = logging.getLogger("serve")

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
"""A comment, which clients ignore."""
LINE_ENDS = str.maketrans({end: f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"})
"""What ends a line for some readers of events, as JSON writes it in ASCII; other line ends are escaped already."""

OR_STREAM: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer; with `stream` its pieces as server-sent events, then `data: [DONE]`.",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    }
}
"""For OpenAPI: what a route answers with besides its response model."""


class StreamEvent(Protocol):
    """A pydantic model with the fields that close a stream."""

    usage: Usage | None
    emoe: EmoeAnswer | None

    def model_dump_json(self) -> str:
        """The event as one line of JSON."""
        ...


ChunkType = TypeVar("ChunkType", bound=StreamEvent, covariant=True)


class Writer(Protocol):
    """Turns progress into the chunks of one endpoint."""

    def chunks(self, progress: Update) -> Sequence[Any]:
        """What to send for one delta; nothing when it carries no visible text. A finishing delta gives at least one."""
        ...


class ChunkWriter(Writer, Protocol[ChunkType]):
    """Turns progress into OpenAI's chunks."""

    def empty(self) -> ChunkType:
        """A chunk without choices, for the usage."""
        ...

    def usage(self, outputs: list[RequestOutput]) -> Usage:
        """Tokens of a finished request."""
        ...


def sse(json: str, name: str = "") -> bytes:
    """An event of JSON, which has what is not ASCII in texts only; with a name if the API has events named."""
    head = f"event: {name}\ndata: " if name else "data: "
    return (head + (json if json.isascii() else json.translate(LINE_ENDS)) + "\n\n").encode()


class Wire(Protocol):
    """How one API writes the events of a stream."""

    keep_alive: bytes
    done: bytes

    def opening(self) -> Sequence[Any]:
        """Chunks that go out at once, before there is any token."""
        ...

    def event(self, chunk: Any) -> bytes:
        """One chunk."""
        ...

    def error(self, status: int, body: ErrorBody) -> bytes:
        """What ended the stream."""
        ...

    def closed(self, chunks: list[Any], writer: Any, outputs: list[RequestOutput], include_usage: bool) -> list[Any]:
        """The last chunks of a writer, with what is known only at the end."""
        ...


class OpenAiWire:
    """Events without names, and a last one that is no JSON."""

    keep_alive = KEEP_ALIVE
    done = DONE

    def opening(self) -> Sequence[Any]:
        """The first chunk comes with the first delta."""
        return ()

    def event(self, chunk: StreamEvent) -> bytes:
        """One chunk."""
        return sse(chunk.model_dump_json())

    def error(self, status: int, body: ErrorBody) -> bytes:
        """OpenAI's clients look for the `error` of any event."""
        return sse(ErrorResponse(error=body).model_dump_json())

    def closed(
        self, chunks: list[Any], writer: ChunkWriter[Any], outputs: list[RequestOutput], include_usage: bool
    ) -> list[Any]:
        """`emoe` is on the very last. Only a client that asked for usage gets a chunk without choices."""
        if include_usage:
            chunks = [*chunks, writer.empty()]
            chunks[-1].usage = writer.usage(outputs)
        chunks[-1].emoe = emoe_of(outputs)
        return chunks


OPENAI = OpenAiWire()


class EventStream(StreamingResponse):
    """Sends a generation as events; frees the engine's side however the stream ends.

    Status and headers go out at once. What can be refused has been refused by then: the engine has taken all prompts.
    """

    def __init__(
        self,
        generation: Generation,
        writer: Writer,
        options: StreamOptions | None = None,
        wire: Wire = OPENAI,
    ):
        self._generation = generation
        self._wire = wire
        self._writer = writer
        self._options = options or StreamOptions()
        super().__init__(
            (),  # made when the call says how long it may be silent
            media_type="text/event-stream",
            headers={"cache-control": "no-cache", "x-accel-buffering": "no"},
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        keep_alive: float = scope["app"].state.keep_alive
        self.body_iterator = _events(self._generation, self._writer, self._options, self._wire, keep_alive)
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._generation.abort()


async def _events(
    generation: Generation, writer: Writer, options: StreamOptions, wire: Wire, keep_alive: float
) -> AsyncIterator[bytes]:
    include_usage = bool(options.include_usage)
    prompt_tokens, completion_tokens = generation.stats.prompt_tokens, 0
    outputs: dict[int, RequestOutput] = {}
    sent = time.monotonic()
    failure: str | None = None
    try:
        if opening := wire.opening():
            yield b"".join(map(wire.event, opening))
        async for batch in generation.batches(patience=keep_alive):
            chunks: list[Any] = []
            for progress in batch:
                new = writer.chunks(progress)
                completion_tokens += len(progress.delta.token_ids)
                failure = failure or progress.delta.error
                if include_usage and options.continuous_usage_stats:
                    for chunk in new:
                        chunk.usage = Usage(
                            prompt_tokens=prompt_tokens,
                            completion_tokens=completion_tokens,
                            total_tokens=prompt_tokens + completion_tokens,
                        )
                chunks += new
            outputs.update((progress.position, progress.output) for progress in batch if progress.output is not None)
            if len(outputs) == len(generation.request_ids):
                chunks = wire.closed(chunks, writer, list(outputs.values()), include_usage)
            if chunks:
                yield b"".join(map(wire.event, chunks))
            elif time.monotonic() - sent >= keep_alive:
                yield wire.keep_alive
            else:
                continue
            sent = time.monotonic()
        if failure is not None:  # after the chunks: clients stop reading here
            yield wire.error(*describe(early_end(failure))[:2])
    except Exception as error:
        # The status line is long gone; the error goes out as an event, which is what clients expect.
        status, body, _ = describe(error)
        if status == 500:
            log.error("a stream failed", exc_info=error)
        yield wire.error(status, body)
    yield wire.done
