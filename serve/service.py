"""What every route shares: the served model's names, its text codec and the worker."""

import asyncio
import dataclasses
import hashlib
import time
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from fastapi import Request

from emoe_jax.errors import RequestError
from emoe_jax.requests.request import RequestOutput, SamplingParams
from emoe_jax.tasks.profile import OTHER
from serve.answers import EmoeAnswer, PromptTokensDetails, Usage
from serve.errors import ApiError
from serve.generation import Generation, Submission
from serve.parsing.forms import PLAIN, AnswerForm
from serve.schema import EmoeRequest, GatewayHeaders
from serve.text import TextCodec
from serve.worker import EngineWorker

Result = TypeVar("Result")

MAX_REQUEST_LOGPROBS = 2**22
"""Of all answers and prompts of a request, alternatives included. They are kept until the request ends: a tenth of a
kilobyte each, and more while the answer is written.
"""


class ClientGone(Exception):
    """The client closed the connection. There is no reader for the answer."""


@dataclasses.dataclass(frozen=True)
class Service:
    """One served model. `names[0]` is the name in answers, the others are aliases."""

    names: tuple[str, ...]
    text: TextCodec
    worker: EngineWorker
    tasks: tuple[str, ...] | None = None
    """Tasks of the task profile; None without one, when a request may name any."""
    sampling_defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Sampling parameters of requests that leave them open, as the checkpoint says."""
    form: AnswerForm = PLAIN
    """How the model writes reasoning and calls of tools."""
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    @property
    def known_tasks(self) -> tuple[str, ...] | None:
        """Tasks that a request may name; None where it may name any."""
        return None if self.tasks is None else (*self.tasks, OTHER)

    @property
    def max_model_len(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        return self.text.max_model_len

    def check_model(self, name: str | None) -> None:
        """The empty name is the served model's, as is none."""
        if name and name not in self.names:
            raise ApiError(
                404,
                f"the model {name[:100]!r} does not exist; this server has {', '.join(self.names)}",
                param="model",
                code="model_not_found",
            )

    def token_budget(self, prompt: Sequence[int], param: str, asked: int | None, asked_param: str) -> int:
        """How many tokens may follow the prompt: what was asked for, or all that the context still holds.

        Clients know refusals by "prompt is too long" and "this model's maximum context length is" in the message.
        """
        room = self.max_model_len - len(prompt)
        if room < 1:
            raise RequestError(
                f"the prompt is too long: it has {len(prompt)} tokens; this model's maximum context length is "
                f"{self.max_model_len} tokens, one of them for the answer",
                param=param,
                code="context_length_exceeded",
            )
        if asked is not None and asked > room:
            raise RequestError(
                f"this model's maximum context length is {self.max_model_len} tokens; {len(prompt)} prompt tokens and "
                f"{asked_param} = {asked} exceed it",
                param=asked_param,
                code="context_length_exceeded",
            )
        return min(room, self.sampling_defaults.get("max_tokens", room)) if asked is None else asked

    def check_room(self, prompts: int, n: int) -> None:
        """Refuse a request before it costs anything: `RequestError` where its sequences can never all be taken,
        `QueueFull` or `Unavailable` where they cannot be now.
        """
        most = self.worker.max_unfinished
        if prompts > most:
            raise RequestError(f"{prompts} prompts in one request; at most {most} are taken", param="prompt")
        if prompts * n > most:
            raise RequestError(
                f"{prompts} prompt{'s' * (prompts > 1)} with n = {n} are {prompts * n} sequences; at most {most} are "
                "taken in one request",
                param="n",
            )
        self.worker.check_room(prompts * n)

    async def begin(
        self,
        request: Request,
        prompts: Sequence[list[int]],
        params: Sequence[SamplingParams],
        emoe: EmoeRequest | None,
        headers: GatewayHeaders,
        cache_salt: str | None,
    ) -> Generation:
        """Hand the prompts of a request to the engine and wait until it has taken them."""
        grammar = await until_disconnect(request, self.text.prepare(params[0].structured_outputs))
        emoe = emoe or EmoeRequest()
        task, param = (emoe.task, "emoe.task") if emoe.task is not None else (headers.x_emoe_task, "x-emoe-task")
        if task is not None and self.known_tasks is not None and task not in self.known_tasks:
            known = ", ".join(self.known_tasks)
            raise RequestError(f"the task {task!r} is not in the task profile; it has {known}", param)
        deadlines, salt = headers.to_slo(emoe.slo), salt_of(request.state.tenant, cache_salt)
        submissions = [
            Submission(prompt, sampling, task, emoe.routing, emoe.tolerance, deadlines, salt, grammar)
            for prompt, sampling in zip(prompts, params, strict=True)
        ]
        if (logprobs := sum(submission.logprobs for submission in submissions)) > MAX_REQUEST_LOGPROBS:
            raise RequestError(
                f"the answers may have {logprobs} log probabilities (prompts, n, max_tokens and logprobs multiply); at "
                f"most {MAX_REQUEST_LOGPROBS} are taken in one request",
                param="logprobs",
            )
        generation = self.worker.submit(submissions, request.state.stats)
        try:
            await generation.accepted()
        except RequestError as error:
            if error.param in EmoeRequest.model_fields:  # the engine knows these fields by their own names
                error.param = f"emoe.{error.param}"
            raise
        except asyncio.CancelledError:
            generation.abort()
            raise
        return generation


def salt_of(tenant: bytes | None, cache_salt: str | None) -> str | None:
    """What the engine keeps the prompts of a request apart by: its API key, where there are several, and its own salt.

    A salt is a key's own: clients of two keys that choose the same one, such as a user's number, share nothing.
    """
    if tenant is None:
        return cache_salt
    return hashlib.sha256(tenant + (cache_salt or "").encode()).hexdigest()


async def until_disconnect(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`. When the client leaves first, `work` is cancelled and `ClientGone` raised."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        task.cancel()
        watcher.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def usage_of(outputs: Sequence[RequestOutput]) -> Usage:
    """Tokens of several prompts and all their answers, as OpenAI counts them."""
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    completion = sum(_completion_tokens(output) for output in outputs)
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(output.num_cached_tokens for output in outputs)),
    )


def emoe_of(outputs: Sequence[RequestOutput]) -> EmoeAnswer:
    """One extension for the whole answer: prompts weigh in by their tokens; a task only when all share it."""
    tokens = [len(output.prompt_token_ids) + _completion_tokens(output) for output in outputs]

    def mean(values: Iterable[float]) -> float:
        return round(sum(value * count for value, count in zip(values, tokens, strict=True)) / max(1, sum(tokens)), 6)

    tasks = {output.task for output in outputs}
    return EmoeAnswer(
        task=tasks.pop() if len(tasks) == 1 else None,
        routing=outputs[0].routing,
        tolerance=outputs[0].tolerance,
        substituted=mean(output.substituted for output in outputs),
        substituted_weight=mean(output.substituted_weight for output in outputs),
        slo_unattainable=any(output.slo_unattainable for output in outputs),
    )


def _completion_tokens(output: RequestOutput) -> int:
    return sum(len(completion.token_ids) for completion in output.completions)
