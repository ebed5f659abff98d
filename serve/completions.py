"""POST /v1/completions."""

import dataclasses
import time
import uuid
from collections.abc import Sequence
from typing import Annotated

from fastapi import APIRouter, Header, Request
from fastapi.responses import Response

from emoe_jax.requests.request import RequestOutput, TokenLogprob
from serve.answers import CompletionChoice, CompletionLogprobs, CompletionResponse, Usage
from serve.failures import check_answered
from serve.generation import Update
from serve.http.body import JsonRoute
from serve.logprobs import TokenPlaces, characters, completion_logprobs
from serve.schema import DEFAULT_COMPLETION_TOKENS, CompletionRequest, GatewayHeaders
from serve.service import Service, emoe_of, until_disconnect, usage_of
from serve.stream import OR_STREAM, EventStream


def completion_routes(service: Service) -> APIRouter:
    """A router with the one route, for this service."""
    router = APIRouter(route_class=JsonRoute, tags=["generation"])

    @router.post("/v1/completions", response_model=CompletionResponse, responses=OR_STREAM)
    async def create_completion(
        body: CompletionRequest, request: Request, headers: Annotated[GatewayHeaders, Header()]
    ) -> Response:
        """Continue a prompt. A stream's events have the shape of the whole answer."""
        service.check_model(body.model)
        service.check_room(len(body.prompt), body.n or 1)
        prompts = await until_disconnect(request, service.text.encode_all(body.prompt, body.add_special_tokens))
        params = []
        for prompt in prompts:
            budget = service.token_budget(prompt, "prompt", body.max_tokens, "max_tokens")
            # An answer of no tokens is one of which the only token is not shown.
            count = max(1, min(budget, DEFAULT_COMPLETION_TOKENS) if body.max_tokens is None else body.max_tokens)
            sampling = body.to_params(count, body.logprobs, service.sampling_defaults)
            if body.scores_prompt:
                sampling = dataclasses.replace(sampling, prompt_logprobs=body.logprobs)
            params.append(sampling)
        writer = CompletionWriter(service, body, prompts, await until_disconnect(request, _echoes(service, body)))
        generation = await service.begin(request, prompts, params, body.emoe, headers, body.cache_salt)
        if body.stream:
            return EventStream(generation, writer, body.stream_options)
        try:
            outputs = await until_disconnect(request, generation.outputs())
        finally:
            generation.abort()
        check_answered(outputs)
        if body.max_tokens == 0:
            outputs = [_without_answer(output) for output in outputs]
        return Response(writer.whole(outputs).model_dump_json(), media_type="application/json")

    return router


async def _echoes(service: Service, body: CompletionRequest) -> list[str]:
    """What goes before each answer: the prompt when `echo` is set, else nothing."""
    if not body.echo:
        return [""] * len(body.prompt)
    return [
        prompt if isinstance(prompt, str) else await service.text.decode(prompt, "prompt") for prompt in body.prompt
    ]


def _without_answer(output: RequestOutput) -> RequestOutput:
    """The output as if no token had been generated."""
    completions = [
        dataclasses.replace(
            completion,
            text="",
            token_ids=[],
            logprobs=None if completion.logprobs is None else [],
            finish_reason="length" if completion.error is None else "error",
        )
        for completion in output.completions
    ]
    return dataclasses.replace(output, completions=completions)


@dataclasses.dataclass
class CompletionWriter:
    """Builds the answer to one request, whole or in chunks."""

    service: Service
    request: CompletionRequest
    prompts: list[list[int]]
    echoes: list[str]
    id: str = dataclasses.field(default_factory=lambda: f"cmpl-{uuid.uuid4().hex}")
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))
    begun: dict[int, TokenPlaces] = dataclasses.field(default_factory=dict)
    """Choices that have got their first chunk."""

    def whole(self, outputs: list[RequestOutput]) -> CompletionResponse:
        """The answer to finished prompts, which `outputs` holds in the order of the request."""
        answer = self.empty()
        for position, output in enumerate(outputs):
            for completion in output.completions:
                choice = CompletionChoice(
                    index=self._choice(position, completion.index),
                    text=self.echoes[position] + completion.text,
                    finish_reason=completion.finish_reason,
                )
                if completion.logprobs is not None:
                    places, scored = self._places(position), output.prompt_logprobs or ()
                    choice.logprobs = self._first_logprobs(position, places, scored, completion.logprobs)
                if self.request.return_token_ids:
                    choice.prompt_token_ids = self.prompts[position]
                    choice.token_ids = completion.token_ids
                answer.choices.append(choice)
        answer.usage = self.usage(outputs)
        answer.emoe = emoe_of(outputs)
        return answer

    def chunks(self, progress: Update) -> list[CompletionResponse]:
        """What to send for one delta; may be nothing. The first chunk of a choice begins with the echoed prompt."""
        delta = progress.delta
        index = self._choice(progress.position, delta.index)
        first = index not in self.begun
        choice = CompletionChoice(index=index, text=delta.text, finish_reason=delta.finish_reason)
        if first:
            self.begun[index] = self._places(progress.position)
            choice.text = self.echoes[progress.position] + delta.text
        if delta.logprobs:
            places = self.begun[index]
            if first:
                choice.logprobs = self._first_logprobs(progress.position, places, delta.prompt_logprobs, delta.logprobs)
            else:
                choice.logprobs = completion_logprobs(delta.logprobs, self.service.text, places)
        if self.request.return_token_ids:
            choice.token_ids = list(delta.token_ids)
            if first:
                choice.prompt_token_ids = self.prompts[progress.position]
        if not (choice.text or choice.finish_reason or choice.logprobs or choice.token_ids):
            return []
        answer = self.empty()
        answer.choices.append(choice)
        return [answer]

    def empty(self) -> CompletionResponse:
        """An answer without choices, for the usage of a stream and as the start of a whole answer."""
        return CompletionResponse(id=self.id, created=self.created, model=self.service.names[0], choices=[])

    def usage(self, outputs: list[RequestOutput]) -> Usage:
        """Tokens of all prompts and answers."""
        return usage_of(outputs)

    def _places(self, position: int) -> TokenPlaces:
        """From the first token on that has a log probability: of the prompt when it is scored, else of the answer."""
        text, ids = self.service.text, self.prompts[position]
        if not self.request.scores_prompt:
            return TokenPlaces(text, text.begins_text(ids))
        # The echo need not show all that tokens hold: a first blank, a token that begins the text.
        return TokenPlaces(text, False, len(self.echoes[position]) - characters(text, ids))

    def _first_logprobs(
        self, position: int, places: TokenPlaces, prompt: Sequence[TokenLogprob], answer: Sequence[TokenLogprob]
    ) -> CompletionLogprobs:
        """Those of the answer, after those of its prompt when it is echoed."""
        if not self.request.scores_prompt:
            return completion_logprobs(answer, self.service.text, places)
        return completion_logprobs([*prompt, *answer], self.service.text, places, self.prompts[position])

    def _choice(self, position: int, index: int) -> int:
        return position * (self.request.n or 1) + index
