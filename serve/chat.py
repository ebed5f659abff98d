"""POST /v1/chat/completions."""

import dataclasses
import time
import uuid
from typing import Annotated

from fastapi import APIRouter, Header, Request
from fastapi.responses import Response

from emoe_jax.requests.request import RequestOutput
from serve.answers import AssistantMessage, ChatChoice, ChatChunk, ChatChunkChoice, ChatDelta, ChatResponse
from serve.body import JsonRoute
from serve.failures import check_answered
from serve.generation import Update
from serve.logprobs import TokenPlaces, chat_logprobs
from serve.schema import ChatRequest, SloHeaders
from serve.service import Service, emoe_of, until_disconnect, usage_of
from serve.stream import OR_STREAM, EventStream


def chat_routes(service: Service) -> APIRouter:
    """A router with the one route, for this service."""
    router = APIRouter(route_class=JsonRoute, tags=["generation"])

    @router.post("/v1/chat/completions", response_model=ChatResponse, responses=OR_STREAM)
    async def create_chat_completion(
        body: ChatRequest, request: Request, slo: Annotated[SloHeaders, Header()]
    ) -> Response:
        """Answer a conversation. A stream's events are `chat.completion.chunk` objects."""
        service.check_model(body.model)
        messages = [message.to_template() for message in body.messages]
        service.check_room(1, body.n or 1)
        prompt = await until_disconnect(request, service.text.chat(messages, **body.template_arguments()))
        if body.max_completion_tokens is not None:
            asked, asked_param = body.max_completion_tokens, "max_completion_tokens"
        else:
            asked, asked_param = body.max_tokens, "max_tokens"
        max_tokens = service.token_budget(prompt, "messages", asked, asked_param)
        params = body.to_params(
            max_tokens, (body.top_logprobs or 0) if body.logprobs else None, service.sampling_defaults
        )
        writer = ChatWriter(service, body, prompt)
        generation = await service.begin(request, [prompt], [params], body.emoe, slo, body.cache_salt)
        if body.stream:
            return EventStream(generation, writer, body.stream_options)
        try:
            outputs = await until_disconnect(request, generation.outputs())
        finally:
            generation.abort()
        check_answered(outputs)
        return Response(writer.whole(outputs[0]).model_dump_json(), media_type="application/json")

    return router


@dataclasses.dataclass
class ChatWriter:
    """Builds the answer to one request, whole or in chunks."""

    service: Service
    request: ChatRequest
    prompt: list[int]
    id: str = dataclasses.field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))
    begun: dict[int, TokenPlaces] = dataclasses.field(default_factory=dict)
    """Choices that have got their first chunk."""

    def whole(self, output: RequestOutput) -> ChatResponse:
        """The answer to a finished request, one choice for each of its `n` completions."""
        choices = []
        for completion in output.completions:
            choice = ChatChoice(
                index=completion.index,
                message=AssistantMessage(content=completion.text),
                finish_reason=completion.finish_reason,
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
            usage=usage_of([output]),
            emoe=emoe_of([output]),
            prompt_token_ids=self.prompt if self.request.return_token_ids else None,
        )

    def chunks(self, progress: Update) -> list[ChatChunk]:
        """What to send for one delta: an opening chunk with the role where the choice is new, then its text.

        A delta without text, log probabilities, token ids or finish reason adds no chunk of its own.
        """
        delta = progress.delta
        result = []
        if delta.index not in self.begun:
            opening = self._chunk(ChatChunkChoice(index=delta.index, delta=ChatDelta(role="assistant", content="")))
            if self.request.return_token_ids and not self.begun:
                opening.prompt_token_ids = self.prompt
            result.append(opening)
            self.begun[delta.index] = self._places()
        choice = ChatChunkChoice(
            index=delta.index,
            delta=ChatDelta(content=delta.text or None),
            finish_reason=delta.finish_reason,
        )
        if delta.logprobs:
            choice.logprobs = chat_logprobs(delta.logprobs, self.service.text, self.begun[delta.index])
        if self.request.return_token_ids:
            choice.token_ids = list(delta.token_ids)
        if choice.delta.content or choice.finish_reason or choice.logprobs or choice.token_ids:
            result.append(self._chunk(choice))
        return result

    def _places(self) -> TokenPlaces:
        return TokenPlaces(self.service.text, self.service.text.begins_text(self.prompt))

    def empty(self) -> ChatChunk:
        """A chunk without choices, for the usage."""
        return ChatChunk(id=self.id, created=self.created, model=self.service.names[0], choices=[])

    def _chunk(self, choice: ChatChunkChoice) -> ChatChunk:
        chunk = self.empty()
        chunk.choices.append(choice)
        return chunk
