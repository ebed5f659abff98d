"""What became of one HTTP request, for metrics and log."""

import time
from collections.abc import Sequence

from emoe_jax.requests.request import Delta, FinishReason, RequestOutput, SamplingParams
from serve.telemetry.metrics import RequestMetrics


class RequestStats:
    """Made when a request arrives; belongs to the event loop. Times are seconds on the monotonic clock."""

    def __init__(self, metrics: RequestMetrics):
        self.arrived = time.monotonic()
        self.first_token_at: float | None = None
        self.params: SamplingParams | None = None
        """Of its first prompt; None until the engine is asked."""
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.finish_reasons: set[FinishReason] = set()
        self.outputs: list[RequestOutput] = []
        """Prompts of which all answers have ended."""
        self._metrics = metrics
        self._unfinished = 0
        self._prompts: list[int] = []
        self._answers: dict[tuple[int, int], _Answer] = {}

    def submitted(self, prompts: Sequence[int], params: Sequence[SamplingParams]) -> None:
        """The engine is asked for answers to prompts of these lengths in tokens."""
        self.params = params[0]
        self._prompts = list(prompts)
        self._unfinished = sum(item.n for item in params)
        self.prompt_tokens = sum(prompts)

    def add(self, position: int, delta: Delta, output: RequestOutput | None) -> None:
        """An answer to the prompt at `position` has grown."""
        now, metrics, count = time.monotonic(), self._metrics, len(delta.token_ids)
        self.completion_tokens += count
        metrics.generation_tokens += count
        answer = self._answers.get((position, delta.index))
        if answer is None:
            metrics.prompt_tokens += self._prompts[position]
            self._prompts[position] = 0  # counted
            answer = self._answers[position, delta.index] = _Answer(now)
            if count:  # an answer may end with an error before its first token
                metrics.first_token.observe(now - self.arrived)
                if self.first_token_at is None:
                    self.first_token_at = now
        elif count:
            metrics.inter_token.observe(now - answer.last_at)
        answer.last_at = now
        answer.tokens += count
        if delta.finish_reason is not None:
            self._unfinished -= 1
            self._end(delta.finish_reason, 1)
            metrics.latency.observe(now - self.arrived)
            if answer.tokens > 1:
                metrics.per_output_token.observe((now - answer.first_at) / (answer.tokens - 1))
        if output is not None:
            self.outputs.append(output)
            for completion in output.completions:
                if completion.queue_seconds is not None:
                    metrics.queue.observe(completion.queue_seconds)

    def end(self, reason: FinishReason) -> None:
        """What is unfinished ends without another token."""
        if self._unfinished:
            self._end(reason, self._unfinished)
            self._unfinished = 0

    def _end(self, reason: FinishReason, answers: int) -> None:
        self.finish_reasons.add(reason)
        self._metrics.finished[reason] += answers


class _Answer:
    """Times of one answer's tokens."""

    def __init__(self, first_at: float):
        self.first_at = self.last_at = first_at
        self.tokens = 0
