"""Server-sent events of a running generation."""

import logging
import time
from collections.abc import AsyncIterator
from typing import Any, Protocol, TypeVar

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from emoe_jax.requests.request import RequestOutput
from serve.answers import EmoeAnswer, Usage
from serve.errors import ErrorResponse, describe
from serve.failures import early_end
from serve.generation import Generation, Update
from serve.options import KEEP_ALIVE_SECONDS
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


ChunkType = TypeVar("ChunkType", bound=StreamEvent)


class ChunkWriter(Protocol[ChunkType]):
    """Turns progress into the chunks of one endpoint."""

    def chunks(self, progress: Update) -> list[ChunkType]:
        """What to send for one delta; nothing when it carries no visible text. A finishing delta gives at least one."""
        ...

    def empty(self) -> ChunkType:
        """A chunk without choices, for the usage."""
        ...

    def usage(self, outputs: list[RequestOutput]) -> Usage:
        """Tokens of a finished request."""
        ...


def sse(json: str) -> bytes:
    """An event of JSON, which has what is not ASCII in texts only."""
    return b"data: " + (json if json.isascii() else json.translate(LINE_ENDS)).encode() + b"\n\n"


class EventStream(StreamingResponse):
    """Sends a generation as events; frees the engine's side however the stream ends.

    Status and headers go out at once. What can be refused has been refused by then: the engine has taken all prompts.
    """

    def __init__(self, generation: Generation, writer: ChunkWriter[Any], options: StreamOptions | None):
        self._generation = generation
        self._writer = writer
        self._options = options or StreamOptions()
        super().__init__(
            (),  # made when the call says how long it may be silent
            media_type="text/event-stream",
            headers={"cache-control": "no-cache", "x-accel-buffering": "no"},
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        keep_alive: float = scope["app"].state.keep_alive
        self.body_iterator = _events(self._generation, self._writer, self._options, keep_alive)
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._generation.abort()


async def _events(
    generation: Generation, writer: ChunkWriter[Any], options: StreamOptions, keep_alive: float = KEEP_ALIVE_SECONDS
) -> AsyncIterator[bytes]:
    include_usage = bool(options.include_usage)
    prompt_tokens, completion_tokens = generation.stats.prompt_tokens, 0
    outputs: dict[int, RequestOutput] = {}
    sent = time.monotonic()
    failure: str | None = None
    try:
        async for batch in generation.batches(patience=keep_alive):
            chunks: list[StreamEvent] = []
            for progress in batch:
                new: list[StreamEvent] = writer.chunks(progress)
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
                chunks = _closed(chunks, writer, list(outputs.values()), include_usage)
            if chunks:
                yield b"".join(sse(chunk.model_dump_json()) for chunk in chunks)
            elif time.monotonic() - sent >= keep_alive:
                yield KEEP_ALIVE
            else:
                continue
            sent = time.monotonic()
        if failure is not None:  # after the chunks: clients stop reading here
            yield sse(ErrorResponse(error=describe(early_end(failure))[1]).model_dump_json())
    except Exception as error:
        # The status line is long gone; the error goes out as an event, which is what OpenAI's clients expect.
        status, body, _ = describe(error)
        if status == 500:
            log.error("a stream failed", exc_info=error)
        yield sse(ErrorResponse(error=body).model_dump_json())
    yield DONE


def _closed(
    chunks: list[ChunkType], writer: ChunkWriter[ChunkType], outputs: list[RequestOutput], include_usage: bool
) -> list[ChunkType]:
    """The last chunks, `emoe` on the very last. Only a client that asked for usage gets a chunk without choices."""
    if include_usage:
        chunks = [*chunks, writer.empty()]
        chunks[-1].usage = writer.usage(outputs)
    chunks[-1].emoe = emoe_of(outputs)
    return chunks
