"""Time per decode step of an engine that runs a step ahead of what it returns."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from emoe_jax import EmoeError, Engine, SamplingParams


class Seconds(NamedTuple):
    """Of one call, the mean over those that were timed."""

    wall: float
    cpu: float
    """Of all threads of the process."""


def per_call(call: Callable[[], Any], calls: int) -> Seconds:
    """Seconds of each of `calls` calls in a row, after one that is not timed.

    An engine that runs ahead starts step n + 1 before it returns step n. After a pause step n has ended already, so
    that the first call returns it for nothing: that is the call before the clock starts. From there on, `calls` calls
    contain `calls` whole steps: the step in flight when the clock starts has only begun, and so has the one that is
    in flight when the clock stops.

        step n      | pause | n+1 | n+2 | n+3 |
        calls             first^  1 ^   2 ^       two calls, two steps
    """
    call()
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(calls):
        call()
    return Seconds((time.perf_counter() - wall) / calls, (time.process_time() - cpu) / calls)


class DecodingBatch:
    """Prompts of an engine that have all been prefilled, so that every `step` decodes one token of each.

    Answers have room for `steps` calls of `step`. Raises `EmoeError` from a call that is not a step of the whole batch:
    its time would be that of another batch.
    """

    MARGIN = 16
    """Tokens that the first prompts may decode while the last ones are prefilled, and one that is in flight."""

    def __init__(self, engine: Engine, prompts: Sequence[Sequence[int]], steps: int):
        self._engine = engine
        params = SamplingParams(max_tokens=steps + self.MARGIN, temperature=0.0, ignore_eos=True)
        self._requests = [f"decoding {index}" for index in range(len(prompts))]
        for request, prompt in zip(self._requests, prompts, strict=True):
            engine.add_request(request, list(prompt), params)
        while not all(self.tokens()):
            engine.step()

    def step(self) -> None:
        advanced = len(self._engine.step())
        if advanced != len(self._requests):
            raise EmoeError(f"a step decoded {advanced} sequences where all {len(self._requests)} were to be timed")

    def tokens(self) -> list[list[int]]:
        """What each prompt has generated."""
        return [self._engine.output(request).completions[0].token_ids for request in self._requests]

    def substituted(self) -> float:
        """Share of expert assignments for which another expert stood in, so far; the mean over prompts."""
        return statistics.mean(self._engine.output(request).substituted for request in self._requests)

    def stop(self) -> None:
        """End the requests, and wait for the step in flight: it would run during the next measurement."""
        for request in self._requests:
            self._engine.pop(request)
        self._engine.step()
