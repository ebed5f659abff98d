"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's API over the same path as chat completions."""

import dataclasses
import json
import uuid
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Request
from fastapi.responses import Response
from pydantic import BaseModel

from emoe_jax.requests.request import Completion, RequestOutput
from serve.answers import EmoeAnswer, Omittable
from serve.chat import Chat, begin_chat
from serve.errors import ErrorBody, MessagesError, describe, messages_error
from serve.failures import failure_of
from serve.generation import Update
from serve.http.body import JsonRoute
from serve.messages.schema import CountRequest, MessagesRequest
from serve.parsing.events import CallArguments, CallBegun, Event, Text, Thought
from serve.reader import as_object
from serve.schema import GatewayHeaders
from serve.service import Service, emoe_of, until_disconnect
from serve.stream import EventStream, sse

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]

ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": MessagesError, "description": "The request is at fault."},
    "5XX": {"model": MessagesError, "description": "Overloaded (503, with Retry-After) or failed."},
}
OR_EVENTS: dict[int | str, dict[str, Any]] = {
    **ERRORS,
    200: {
        "description": "The answer; with `stream` its pieces as named server-sent events.",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    },
}


class MessagesUsage(BaseModel):
    """`input_tokens` are those that had to be computed; others were still there from an earlier request."""

    input_tokens: int
    cache_read_input_tokens: int
    cache_creation_input_tokens: int = 0
    output_tokens: int


class AnswerBlock(BaseModel):
    """A piece of an answer, with the fields of its type."""

    type: Literal["text", "thinking", "tool_use"]
    text: Omittable[str] = None
    thinking: Omittable[str] = None
    signature: Omittable[str] = None
    id: Omittable[str] = None
    name: Omittable[str] = None
    input: Omittable[dict[str, Any]] = None


class MessagesResponse(BaseModel):
    """Answer of `/v1/messages`. In a stream's `message_start` it is empty."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[AnswerBlock]
    stop_reason: StopReason | None = None
    stop_sequence: str | None = None
    usage: MessagesUsage
    emoe: Omittable[EmoeAnswer] = None


class CountResponse(BaseModel):
    """Tokens of the prompt that the messages would become."""

    input_tokens: int


def messages_routes(service: Service) -> APIRouter:
    """A router with both routes, for this service."""
    router = APIRouter(route_class=JsonRoute, tags=["generation"])

    @router.post("/v1/messages", response_model=MessagesResponse, responses=OR_EVENTS)
    async def create_message(
        body: MessagesRequest, request: Request, headers: Annotated[GatewayHeaders, Header()]
    ) -> Response:
        """Answer a conversation, in Anthropic's API."""
        chat = await begin_chat(service, body.to_chat(), request, headers)
        writer = MessagesWriter(service, chat)
        if body.stream:
            return EventStream(chat.generation, writer, wire=ANTHROPIC)
        try:
            output = await until_disconnect(request, chat.read())
        finally:
            chat.generation.abort()
        return Response(writer.whole(output).model_dump_json(), media_type="application/json")

    @router.post("/v1/messages/count_tokens", responses=ERRORS)
    async def count_tokens(body: CountRequest, request: Request) -> CountResponse:
        """How many tokens a conversation has, tools included."""
        service.check_model(body.model)
        chat = body.to_chat()
        messages = [message.to_template() for message in chat.messages]
        encoding = service.text.chat(messages, **chat.template_arguments(), must_fit=False)
        return CountResponse(input_tokens=len(await until_disconnect(request, encoding)))

    return router


@dataclasses.dataclass
class MessagesWriter:
    """Builds the answer to one request, whole or in events. The events are pairs of a name and its fields."""

    service: Service
    chat: Chat
    id: str = dataclasses.field(default_factory=lambda: f"msg_{uuid.uuid4().hex}")
    block: int = -1
    """The block that is being written."""
    kind: tuple[str, int] | None = None
    """What it is, and of which call. None between blocks."""

    def whole(self, output: RequestOutput) -> MessagesResponse:
        """The answer to a finished request. Raises `EngineFailure` where the answer ended by a failure."""
        completion, reader = output.completions[0], self.chat.reader(0)
        if (failure := failure_of(completion)) is not None:
            raise failure
        blocks = []
        if reader.reasoning:
            blocks.append(AnswerBlock(type="thinking", thinking=reader.reasoning, signature=""))
        if reader.content:
            blocks.append(AnswerBlock(type="text", text=reader.content))
        for call in reader.calls:
            blocks.append(AnswerBlock(type="tool_use", id=call.id, name=call.name, input=as_object(call.arguments)))
        return MessagesResponse(
            id=self.id,
            model=self.service.names[0],
            content=blocks,
            stop_reason=self._stop_reason(completion),
            stop_sequence=completion.stop_string,
            usage=_usage(output),
            emoe=emoe_of([output]),
        )

    def chunks(self, progress: Update) -> list[tuple[str, dict[str, Any]]]:
        """What to send for one delta; the start of the message with the first one."""
        events: list[tuple[str, dict[str, Any]]] = []
        if self.block < 0 and not self.chat.readers:
            usage = MessagesUsage(input_tokens=len(self.chat.prompt), cache_read_input_tokens=0, output_tokens=0)
            empty = MessagesResponse(id=self.id, model=self.service.names[0], content=[], usage=usage)
            events.append(("message_start", {"message": empty.model_dump()}))
        for event in self.chat.reader(0).add(progress.delta):
            events += self._written(event)
        return events

    def close(self, output: RequestOutput) -> list[tuple[str, dict[str, Any]]]:
        """The last events. An answer that ended by a failure has an error behind them, and no end of its own."""
        completion = output.completions[0]
        events = self._end_block()
        if (failure := failure_of(completion)) is not None:
            error = messages_error(*describe(failure)[:2]).error.model_dump()
            return events if completion.error else [*events, ("error", {"error": error})]
        delta = {"stop_reason": self._stop_reason(completion), "stop_sequence": completion.stop_string}
        emoe = emoe_of([output]).model_dump()
        events.append(("message_delta", {"delta": delta, "usage": _usage(output).model_dump(), "emoe": emoe}))
        return [*events, ("message_stop", {})]

    def _stop_reason(self, completion: Completion) -> StopReason:
        if completion.finish_reason == "length":
            return "max_tokens"
        if self.chat.reader(0).calls:
            return "tool_use"
        return "end_turn" if completion.stop_string is None else "stop_sequence"

    def _written(self, event: Event) -> list[tuple[str, dict[str, Any]]]:
        match event:
            case Thought(text):
                start, delta = {"type": "thinking", "thinking": "", "signature": ""}, ("thinking_delta", "thinking")
                return [*self._begin(("thinking", 0), start), self._delta(*delta, text)]
            case Text(text):
                start = {"type": "text", "text": ""}
                return [*self._begin(("text", 0), start), self._delta("text_delta", "text", text)]
            case CallBegun(call, name):
                call_id = self.chat.reader(0).calls[call].id
                start = {"type": "tool_use", "id": call_id, "name": name, "input": {}}
                return self._begin(("tool_use", call), start)
            case CallArguments(_, text):
                return [self._delta("input_json_delta", "partial_json", text)]

    def _begin(self, kind: tuple[str, int], start: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
        if self.kind == kind:
            return []
        events = self._end_block()
        self.block, self.kind = self.block + 1, kind
        return [*events, ("content_block_start", {"index": self.block, "content_block": start})]

    def _delta(self, kind: str, field: str, text: str) -> tuple[str, dict[str, Any]]:
        return "content_block_delta", {"index": self.block, "delta": {"type": kind, field: text}}

    def _end_block(self) -> list[tuple[str, dict[str, Any]]]:
        if self.kind is None:
            return []
        self.kind = None
        return [("content_block_stop", {"index": self.block})]


class AnthropicWire:
    """Events with names. The last one is `message_stop`, or `error`."""

    keep_alive = sse('{"type": "ping"}', "ping")
    done = b""

    def opening(self) -> list[Any]:
        """The start of the message comes with the first delta."""
        return []

    def event(self, chunk: tuple[str, dict[str, Any]]) -> bytes:
        """One event; its JSON repeats the name."""
        name, fields = chunk
        return sse(json.dumps({"type": name, **fields}, ensure_ascii=False), name)

    def error(self, status: int, body: ErrorBody) -> bytes:
        """What ended the stream."""
        return sse(messages_error(status, body).model_dump_json(), "error")

    def closed(
        self, chunks: list[Any], writer: MessagesWriter, outputs: list[RequestOutput], include_usage: bool
    ) -> list[Any]:
        """The end of the last block and of the message."""
        return [*chunks, *writer.close(outputs[0])]


ANTHROPIC = AnthropicWire()


def _usage(output: RequestOutput) -> MessagesUsage:
    cached = output.num_cached_tokens
    return MessagesUsage(
        input_tokens=len(output.prompt_token_ids) - cached,
        cache_read_input_tokens=cached,
        output_tokens=len(output.completions[0].token_ids),
    )
