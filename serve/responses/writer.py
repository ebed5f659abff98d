"""Builds the answer to one request of `/v1/responses`, whole or in events."""

import dataclasses
import json
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from emoe_jax.requests.request import RequestOutput
from serve.chat import Chat
from serve.errors import ErrorBody, describe
from serve.failures import check_answered, failure_of
from serve.generation import Update
from serve.parsing.events import CallArguments, CallBegun, Event, Text, Thought
from serve.responses.answers import (
    IncompleteDetails,
    InputTokensDetails,
    ItemStatus,
    OutputItem,
    OutputPart,
    OutputTokensDetails,
    ResponsesAnswer,
    ResponsesFailure,
    ResponsesUsage,
)
from serve.responses.schema import ResponsesRequest, TextFormat
from serve.service import Service, emoe_of
from serve.stream import KEEP_ALIVE, sse

StreamedEvent = dict[str, Any]


@dataclasses.dataclass
class ResponsesWriter:
    """The answer grows item by item, in the order in which the model writes; a whole one is what its events add up to.

    `keep` gets the answer once it has come to its end, unless it failed.
    """

    service: Service
    request: ResponsesRequest
    chat: Chat
    keep: Callable[[ResponsesAnswer], None] = lambda answer: None
    sequence: int = 0
    """Events so far."""
    spoken: int | None = None
    """The place of the message or of the thoughts that are being written; None where neither are."""
    call: int | None = None
    """The place of the call that is being written; None where none is."""

    def __post_init__(self) -> None:
        request, params = self.request, self.chat.params
        text_format = (request.text and request.text.format) or TextFormat(type="text", schema=None)
        effort = request.reasoning.effort if request.reasoning is not None else None
        self.answer = ResponsesAnswer(
            id=f"resp_{uuid.uuid4().hex}",
            created_at=int(time.time()),
            instructions=request.instructions,
            max_output_tokens=request.max_output_tokens,
            metadata=request.metadata or {},
            model=self.service.names[0],
            output=[],
            parallel_tool_calls=request.parallel_tool_calls is not False,
            previous_response_id=request.previous_response_id,
            reasoning={"effort": effort, "summary": None},
            store=request.store is not False,
            temperature=params.temperature,
            text={"format": text_format.model_dump(by_alias=True, exclude_none=True)},
            tool_choice=request.tool_choice or "auto",
            tools=[tool.model_dump() for tool in request.tools or ()],
            top_p=params.top_p,
        )

    async def read(self) -> ResponsesAnswer:
        """The whole answer. Raises `EngineFailure` where it failed before its first token."""
        output = None
        async for batch in self.chat.generation.batches():
            for update in batch:
                self.chunks(update)
                output = update.output or output
        assert output is not None
        check_answered([output])
        self.close(output)
        return self.answer

    def opening(self) -> list[StreamedEvent]:
        """The first events, before there is any token."""
        return [self._lifecycle("created"), self._lifecycle("in_progress")]

    def chunks(self, progress: Update) -> list[StreamedEvent]:
        """What to send for one delta."""
        return [written for event in self.chat.reader(0).add(progress.delta) for written in self._written(event)]

    def close(self, output: RequestOutput) -> list[StreamedEvent]:
        """The last events. Where the model's own numbers failed, `fail` has the very last one."""
        completion = output.completions[0]
        failure, is_cut = failure_of(completion), completion.finish_reason == "length"
        status: ItemStatus = "incomplete" if is_cut or failure is not None else "completed"
        events = [*self._end_spoken(status), *self._end_call(status)]
        self._count(output)
        if failure is not None:
            last = self.fail(describe(failure)[1])
            return events if completion.error else [*events, last]
        self.answer.status = status
        if is_cut:
            self.answer.incomplete_details = IncompleteDetails()
        self.answer.completed_at = None if is_cut else int(time.time())
        self.keep(self.answer)
        return [*events, self._lifecycle(status)]

    def fail(self, error: ErrorBody) -> StreamedEvent:
        """The last event of an answer that failed."""
        self.answer.status, self.answer.error = "failed", ResponsesFailure(message=error.message)
        return self._lifecycle("failed")

    def _count(self, output: RequestOutput) -> None:
        prompt, tokens = len(output.prompt_token_ids), len(output.completions[0].token_ids)
        self.answer.usage = ResponsesUsage(
            input_tokens=prompt,
            input_tokens_details=InputTokensDetails(cached_tokens=output.num_cached_tokens),
            output_tokens=tokens,
            output_tokens_details=OutputTokensDetails(reasoning_tokens=self.chat.reasoning_tokens or 0),
            total_tokens=prompt + tokens,
        )
        self.answer.emoe = emoe_of([output])

    def _written(self, event: Event) -> list[StreamedEvent]:
        match event:
            case Thought(text):
                return self._speak("reasoning", "reasoning_text", text)
            case Text(text):
                return self._speak("message", "output_text", text)
            case CallBegun(call, name):
                call_id = self.chat.reader(0).calls[call].id
                events = [*self._end_spoken(), *self._end_call()]
                item = OutputItem(id=_new_id("fc"), type="function_call", call_id=call_id, name=name, arguments="")
                self.call = len(self.answer.output)
                return [*events, self._add(item)]
            case CallArguments(_, text):
                assert self.call is not None
                item = self.answer.output[self.call]
                item.arguments = (item.arguments or "") + text
                return [self._at(self.call, "function_call_arguments.delta", delta=text)]

    def _speak(self, kind: Any, part_kind: Any, text: str) -> list[StreamedEvent]:
        events: list[StreamedEvent] = []
        if self.spoken is None or self.answer.output[self.spoken].type != kind:
            events += [*self._end_spoken(), *self._end_call()]
            is_message = kind == "message"
            item = OutputItem(id=_new_id("msg" if is_message else "rs"), type=kind, content=[])
            if is_message:
                item.role, part = "assistant", OutputPart(type=part_kind, text="", annotations=[], logprobs=[])
            else:
                item.summary, part = [], OutputPart(type=part_kind, text="")
            self.spoken = len(self.answer.output)
            events.append(self._add(item))
            self._contents.append(part)
            events.append(self._at(self.spoken, "content_part.added", content_index=0, part=part.model_dump()))
        self._contents[0].text += text
        extra = {"logprobs": []} if part_kind == "output_text" else {}
        return [*events, self._at(self.spoken, f"{part_kind}.delta", content_index=0, delta=text, **extra)]

    @property
    def _contents(self) -> list[OutputPart]:
        """The parts of what is being written."""
        assert self.spoken is not None
        content = self.answer.output[self.spoken].content
        assert content is not None
        return content

    def _end_spoken(self, status: ItemStatus = "completed") -> list[StreamedEvent]:
        if self.spoken is None:
            return []
        at, part = self.spoken, self._contents[0]
        extra = {"logprobs": []} if part.type == "output_text" else {}
        events = [
            self._at(at, f"{part.type}.done", content_index=0, text=part.text, **extra),
            self._at(at, "content_part.done", content_index=0, part=part.model_dump()),
            self._done(at, status),
        ]
        self.spoken = None
        return events

    def _end_call(self, status: ItemStatus = "completed") -> list[StreamedEvent]:
        if self.call is None:
            return []
        at, item = self.call, self.answer.output[self.call]
        self.call = None
        done = self._at(at, "function_call_arguments.done", name=item.name, arguments=item.arguments)
        return [done, self._done(at, status)]

    def _add(self, item: OutputItem) -> StreamedEvent:
        self.answer.output.append(item)
        return self._event("output_item.added", output_index=len(self.answer.output) - 1, item=item.model_dump())

    def _done(self, at: int, status: ItemStatus) -> StreamedEvent:
        item = self.answer.output[at]
        item.status = status
        return self._event("output_item.done", output_index=at, item=item.model_dump())

    def _at(self, at: int, kind: str, **fields: Any) -> StreamedEvent:
        return self._event(kind, item_id=self.answer.output[at].id, output_index=at, **fields)

    def _lifecycle(self, kind: str) -> StreamedEvent:
        return self._event(kind, response=self.answer.model_dump())

    def _event(self, kind: str, **fields: Any) -> StreamedEvent:
        event = {"type": f"response.{kind}", "sequence_number": self.sequence, **fields}
        self.sequence += 1
        return event


class ResponsesWire:
    """Events with names. The last one has the response as it ended."""

    keep_alive = KEEP_ALIVE
    done = b""

    def __init__(self, writer: ResponsesWriter):
        self.writer = writer

    def opening(self) -> Sequence[StreamedEvent]:
        """The response, before there is any token."""
        return self.writer.opening()

    def event(self, chunk: StreamedEvent) -> bytes:
        """One event; its JSON repeats the name."""
        return sse(json.dumps(chunk, ensure_ascii=False), chunk["type"])

    def error(self, status: int, body: ErrorBody) -> bytes:
        """What ended the stream."""
        return self.event(self.writer.fail(body))

    def closed(
        self, chunks: list[Any], writer: ResponsesWriter, outputs: list[RequestOutput], include_usage: bool
    ) -> list[Any]:
        """The end of the last item and of the response."""
        return [*chunks, *writer.close(outputs[0])]


def _new_id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"
