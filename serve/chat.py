"""POST /v1/chat/completions."""

import dataclasses
import time
import uuid
from typing import Annotated

from fastapi import APIRouter, Header, Request
from fastapi.responses import Response

from emoe_jax.errors import RequestError
from emoe_jax.requests.request import RequestOutput, SamplingParams
from emoe_jax.requests.structured_params import StructuredOutputsParams
from serve.answers import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatDelta,
    ChatResponse,
    CompletionTokensDetails,
    FunctionCall,
    FunctionCallDelta,
    ToolCallAnswer,
    ToolCallDelta,
    Usage,
)
from serve.failures import check_answered
from serve.generation import Generation, Update
from serve.http.body import JsonRoute
from serve.logprobs import TokenPlaces, chat_logprobs
from serve.parsing.answer_parser import AnswerParser
from serve.parsing.call_grammar import arguments_schema
from serve.parsing.events import CallArguments, CallBegun, Event, Text, Thought
from serve.parsing.forms import PLAIN, AnswerForm, Tools
from serve.reader import AnswerReader
from serve.schema import ChatRequest, GatewayHeaders
from serve.service import Service, emoe_of, until_disconnect, usage_of
from serve.stream import OR_STREAM, EventStream

HIDDEN_TOOLS = (
    "the chat template of this model does not show it the tools, so it cannot choose one; ask for a call with "
    "tool_choice, or start the server with a --chat-template that does"
)
UNUSABLE = "tools cannot be used: "
"""How the compiler's complaint about the grammar of a request's tools begins."""


def chat_routes(service: Service) -> APIRouter:
    """A router with the one route, for this service."""
    router = APIRouter(route_class=JsonRoute, tags=["generation"])

    @router.post("/v1/chat/completions", response_model=ChatResponse, responses=OR_STREAM)
    async def create_chat_completion(
        body: ChatRequest, request: Request, headers: Annotated[GatewayHeaders, Header()]
    ) -> Response:
        """Answer a conversation. A stream's events are `chat.completion.chunk` objects."""
        chat = await begin_chat(service, body, request, headers)
        writer = ChatWriter(service, body, chat)
        if body.stream:
            return EventStream(chat.generation, writer, body.stream_options)
        try:
            output = await until_disconnect(request, chat.read())
        finally:
            chat.generation.abort()
        check_answered([output])
        return Response(writer.whole(output).model_dump_json(), media_type="application/json")

    return router


@dataclasses.dataclass
class Chat:
    """A conversation that the engine answers, and what its answers have said so far."""

    prompt: list[int]
    params: SamplingParams
    generation: Generation
    form: AnswerForm
    opened: bool
    """Whether the prompt has begun the thoughts."""
    tools: Tools | None = None
    """What the answers may call."""
    parallel: bool = True
    """Whether an answer may have several calls."""
    forced: bool = False
    """Whether an answer has to call a tool."""
    readers: dict[int, AnswerReader] = dataclasses.field(default_factory=dict)
    """By the number of the answer among the `n` of the request."""

    def reader(self, index: int) -> AnswerReader:
        """Of one answer, made when it is first asked for."""
        if index not in self.readers:
            self.readers[index] = AnswerReader(
                AnswerParser(self.form, self.tools, opened=self.opened, parallel=self.parallel, forced=self.forced)
            )
        return self.readers[index]

    async def read(self) -> RequestOutput:
        """Read the answers to their ends."""
        output = None
        async for batch in self.generation.batches():
            for update in batch:
                self.reader(update.delta.index).add(update.delta)
                output = update.output or output
        assert output is not None
        return output

    @property
    def reasoning_tokens(self) -> int | None:
        """Of all answers. None where they are not told apart, and where a stop string may have held text back: then
        it is not known which token a tag came with.
        """
        if self.form.reasoning == "none" or self.params.stop:
            return None
        return sum(reader.parser.reasoning_tokens for reader in self.readers.values())


async def begin_chat(service: Service, body: ChatRequest, request: Request, headers: GatewayHeaders) -> Chat:
    """Have the engine take a conversation. Raises what refuses it."""
    service.check_model(body.model)
    messages = [message.to_template() for message in body.messages]
    if body.callable_tools is not None and not body.must_call and not service.text.shows_tools:
        raise RequestError(HIDDEN_TOOLS, param="tools")
    service.check_room(1, body.n or 1)
    prompt = await until_disconnect(request, service.text.chat(messages, **body.template_arguments()))
    if body.max_completion_tokens is not None:
        asked, asked_param = body.max_completion_tokens, "max_completion_tokens"
    else:
        asked, asked_param = body.max_tokens, "max_tokens"
    max_tokens = service.token_budget(prompt, "messages", asked, asked_param)
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    params = body.to_params(max_tokens, logprobs, service.sampling_defaults)
    opened = _has_opened(service, body, prompt)
    params, form = with_form(service, body, params, opened)
    try:
        generation = await service.begin(request, [prompt], [params], body.emoe, headers, body.cache_salt)
    except RequestError as error:
        raise await until_disconnect(request, _naming_tool(service, body, error)) from None
    tools, forced = body.callable_tools, body.must_call
    return Chat(prompt, params, generation, form, opened, tools, body.calls_in_parallel, forced)


def _has_opened(service: Service, body: ChatRequest, prompt: list[int]) -> bool:
    """Whether the prompt has begun the thoughts."""
    if (tags := service.form.thought_tags) is None:
        return False
    if body.continue_final_message:
        said = body.messages[-1].content
        return said.rfind(tags[0]) > said.rfind(tags[1])
    return service.text.ends_in(prompt, tags[0])


async def _naming_tool(service: Service, body: ChatRequest, error: RequestError) -> RequestError:
    """What refused a request; the name of the tool is in it where the schema of one is at fault.

    A grammar of all calls is compiled as one, so that the compiler's complaint does not say which.
    """
    if str(error).startswith(UNUSABLE):
        for name, schema in (body.held_tools or {}).items():
            alone = StructuredOutputsParams(json=arguments_schema(name, schema), param="tools")
            try:
                await service.text.prepare(alone)
            except RequestError as fault:
                return body.unfit(name, str(fault).removeprefix(UNUSABLE))
    return error


def with_form(
    service: Service, body: ChatRequest, params: SamplingParams, opened: bool
) -> tuple[SamplingParams, AnswerForm]:
    """The parameters with what the form of the answers asks for, and the form. Raises `RequestError`."""
    if params.structured_outputs is None:
        form = body.answer_form(service.form)
        grammar = body.to_grammar(form, service.text.special_id, opened)
    elif body.callable_tools is None:  # what has to match something leaves no room for thoughts
        form, grammar = PLAIN, params.structured_outputs
    else:
        param = params.structured_outputs.param
        raise RequestError(f"{param} leaves no room for calls of tools; give tools or {param}", param=param)
    text = service.text
    return dataclasses.replace(
        params,
        structured_outputs=grammar,
        shown_token_ids=text.special_ids(form.tags),
        ending_token_ids=text.special_ids(form.ending_tags),
    ), form


@dataclasses.dataclass
class ChatWriter:
    """Builds the answer to one request, whole or in chunks."""

    service: Service
    request: ChatRequest
    chat: Chat
    id: str = dataclasses.field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))
    begun: dict[int, TokenPlaces] = dataclasses.field(default_factory=dict)
    """Choices that have got their first chunk."""

    def whole(self, output: RequestOutput) -> ChatResponse:
        """The answer to a finished request, one choice for each of its `n` completions."""
        choices = []
        for completion in output.completions:
            reader = self.chat.reader(completion.index)
            choice = ChatChoice(
                index=completion.index,
                message=_message(reader),
                finish_reason=reader.finish_reason(completion.finish_reason),
            )
            if completion.logprobs is not None:
                choice.logprobs = chat_logprobs(completion.logprobs, self.service.text, self._places())
            if self.request.return_token_ids:
                choice.token_ids = completion.token_ids
            choices.append(choice)
        return ChatResponse(
            id=self.id,
            created=self.created,
            model=self.service.names[0],
            choices=choices,
            usage=self.usage([output]),
            emoe=emoe_of([output]),
            prompt_token_ids=self.chat.prompt if self.request.return_token_ids else None,
        )

    def chunks(self, progress: Update) -> list[ChatChunk]:
        """What to send for one delta: an opening chunk with the role where the choice is new, then what it says.

        A delta that says nothing and has no log probabilities, token ids or finish reason adds no chunk of its own.
        """
        delta = progress.delta
        result = []
        if delta.index not in self.begun:
            opening = self._chunk(ChatChunkChoice(index=delta.index, delta=ChatDelta(role="assistant", content="")))
            if self.request.return_token_ids and not self.begun:
                opening.prompt_token_ids = self.chat.prompt
            result.append(opening)
            self.begun[delta.index] = self._places()
        reader = self.chat.reader(delta.index)
        said = [_said(event, reader) for event in reader.add(delta)]
        choices = [ChatChunkChoice(index=delta.index, delta=piece) for piece in said or [ChatDelta()]]
        last = choices[-1]
        last.finish_reason = reader.finish_reason(delta.finish_reason)
        if delta.logprobs:
            last.logprobs = chat_logprobs(delta.logprobs, self.service.text, self.begun[delta.index])
        if self.request.return_token_ids:
            last.token_ids = list(delta.token_ids)
        if said or last.finish_reason or last.logprobs or last.token_ids:
            result += map(self._chunk, choices)
        return result

    def usage(self, outputs: list[RequestOutput]) -> Usage:
        """Tokens of the request, those of the thoughts by themselves where they are known."""
        usage, thoughts = usage_of(outputs), self.chat.reasoning_tokens
        if thoughts is not None:
            usage.completion_tokens_details = CompletionTokensDetails(reasoning_tokens=thoughts)
        return usage

    def _places(self) -> TokenPlaces:
        return TokenPlaces(self.service.text, self.service.text.begins_text(self.chat.prompt))

    def empty(self) -> ChatChunk:
        """A chunk without choices, for the usage."""
        return ChatChunk(id=self.id, created=self.created, model=self.service.names[0], choices=[])

    def _chunk(self, choice: ChatChunkChoice) -> ChatChunk:
        chunk = self.empty()
        chunk.choices.append(choice)
        return chunk


def _message(reader: AnswerReader) -> AssistantMessage:
    """A whole answer. One that calls tools need not say anything."""
    calls = [
        ToolCallAnswer(id=call.id, function=FunctionCall(name=call.name, arguments=call.arguments))
        for call in reader.calls
    ]
    return AssistantMessage(
        content=reader.content or (None if calls else ""),
        reasoning_content=reader.reasoning or None,
        tool_calls=calls or None,
    )


def _said(event: Event, reader: AnswerReader) -> ChatDelta:
    """An event as a chunk tells it."""
    match event:
        case Thought(text):
            return ChatDelta(reasoning_content=text)
        case Text(text):
            return ChatDelta(content=text)
        case CallBegun(call, name):
            function, call_id = FunctionCallDelta(name=name, arguments=""), reader.calls[call].id
            return ChatDelta(tool_calls=[ToolCallDelta(index=call, id=call_id, type="function", function=function)])
        case CallArguments(call, text):
            return ChatDelta(tool_calls=[ToolCallDelta(index=call, function=FunctionCallDelta(arguments=text))])
