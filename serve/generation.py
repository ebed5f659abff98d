"""What one HTTP request has running in the engine, as the event loop sees it."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable

from emoe_jax.requests.contract import RoutingContract
from emoe_jax.requests.request import SLO, Delta, RequestOutput, SamplingParams
from serve.refusals import EngineFailure, Unavailable
from serve.telemetry.stats import RequestStats

MAX_BATCH = 64
"""Deltas handed out at a time. A client that has not read for long must not hold up others when all is sent."""


@dataclasses.dataclass(frozen=True)
class Submission:
    """One prompt for the engine."""

    prompt: list[int]
    params: SamplingParams
    task: str | None = None
    routing: RoutingContract | None = None
    tolerance: float | None = None
    slo: SLO | None = None
    cache_salt: str | None = None
    grammar: object = None
    """What was compiled for `params`; kept until the engine has found it, which would compile it anew otherwise."""

    @property
    def logprobs(self) -> int:
        """Log probabilities that its answers may come to have, those of the prompt included."""
        params = self.params
        answers = 0 if params.logprobs is None else params.n * params.max_tokens * (1 + params.logprobs)
        scored = 0 if params.prompt_logprobs is None else len(self.prompt) * (1 + params.prompt_logprobs)
        return answers + scored


@dataclasses.dataclass(frozen=True, slots=True)
class Update:
    """A delta of the prompt at `position`; `output` is set on the delta that finishes that prompt."""

    position: int
    delta: Delta
    output: RequestOutput | None


class Generation:
    """What one HTTP request has running in the engine: one or more prompts. Lives on the event loop."""

    def __init__(
        self, request_ids: list[str], sequences: int, stats: RequestStats, abort: Callable[["Generation"], None]
    ):
        """`abort` frees in the engine what is left of a generation."""
        self._abort = abort
        self.request_ids = request_ids
        self.stats = stats
        self.unfinished = sequences
        self._events: asyncio.Queue[Update | Exception] = asyncio.Queue()
        self._taken = asyncio.Event()
        self._refusal: Exception | None = None

    async def accepted(self) -> None:
        """Wait until the engine took every prompt; the first may have tokens by then. Raises `RequestError` when the
        engine refused one.
        """
        await self._taken.wait()
        if self._refusal is not None:
            raise self._refusal

    async def batches(self, patience: float | None = None) -> AsyncIterator[list[Update]]:
        """Deltas in the order the engine made them, as many as have come in: a client that reads slowly gets them in
        fewer pieces; none at all when nothing has come for `patience` seconds. Raises when the engine failed or the
        server stopped.
        """
        remaining = len(self.request_ids)
        while remaining:
            try:
                async with asyncio.timeout(patience):
                    events = [await self._events.get()]
            except TimeoutError:
                yield []
                continue
            while not self._events.empty() and len(events) < MAX_BATCH:
                events.append(self._events.get_nowait())
            batch = [event for event in events if isinstance(event, Update)]
            remaining -= sum(event.output is not None for event in batch)
            if batch:
                yield batch
            for event in events:
                if isinstance(event, Exception):
                    raise event

    async def outputs(self) -> list[RequestOutput]:
        """All finished prompts, in the order they were submitted."""
        outputs: dict[int, RequestOutput] = {}
        async for batch in self.batches():
            outputs.update((event.position, event.output) for event in batch if event.output is not None)
        return [outputs[position] for position in sorted(outputs)]

    def abort(self) -> None:
        """Free what is left in the engine; nothing happens when all is finished."""
        self._abort(self)

    def deliver(self, event: Update | Exception | None) -> None:
        """Take one event of the engine, on the event loop.

        None says that the engine took every prompt. An exception before that is the refusal that `accepted` raises.
        A later one is raised by `batches`.
        """
        if isinstance(event, Update):
            self.stats.add(event.position, event.delta, event.output)
        elif isinstance(event, EngineFailure | Unavailable):
            self.stats.end("error")
        if isinstance(event, Exception) and not self._taken.is_set():
            self._refusal = event
        if event is None or self._refusal is not None:
            self._taken.set()
        else:
            self._events.put_nowait(event)
