"""A request from its arrival to its last token, as the caller sees it."""

from collections.abc import Callable

from emoe_jax.requests.request import Completion, Delta, FinishReason, RequestOutput, TokenLogprob
from emoe_jax.requests.sequence import Sequence, substituted_share
from emoe_jax.requests.text import TextStream
from emoe_jax.scheduling.plan import SampledToken


class Answer:
    """Collects the sequences of one request into its `RequestOutput`."""

    def __init__(
        self,
        output: RequestOutput,
        sequences: list[Sequence],
        text_stream: Callable[[Sequence], TextStream],
        top_k: int,
    ):
        """`text_stream` makes what turns a sequence's tokens into text, when its first token comes."""
        self._output = output
        self._sequences = sequences
        self._text_stream = text_stream
        self._top_k = top_k
        self._streams: dict[int, TextStream] = {}

    @classmethod
    def of(cls, sequences: list[Sequence], text_stream: Callable[[Sequence], TextStream], top_k: int) -> "Answer":
        """To the request whose sequences these are, before their first token."""
        first = sequences[0]
        wants_logprobs = first.params.logprobs is not None
        completions = [Completion(each.index, logprobs=[] if wants_logprobs else None) for each in sequences]
        output = RequestOutput(first.request_id, first.prompt_token_ids, completions, first.task, first.routing)
        output.tolerance = first.bounded.tolerance if first.routing == "bounded" else None
        output.prompt_logprobs = None if first.params.prompt_logprobs is None else []
        return cls(output, sequences, text_stream, top_k)

    @property
    def sequences(self) -> list[Sequence]:
        """One per completion."""
        return self._sequences

    @property
    def finished(self) -> bool:
        """Whether every completion of the request has a finish reason, `error` and `abort` included."""
        return self._output.finished

    @property
    def output(self) -> RequestOutput:
        """The request so far."""
        assigned = sum(sequence.assigned for sequence in self._sequences)
        replaced = sum(sequence.substituted for sequence in self._sequences)
        weight = sum(sequence.substituted_weight for sequence in self._sequences)
        self._output.substituted = replaced / assigned if assigned else 0.0
        self._output.substituted_weight = substituted_share(weight, assigned, self._top_k)
        self._output.num_cached_tokens = self._sequences[0].num_cached
        self._output.slo_unattainable = any(sequence.slo_unattainable for sequence in self._sequences)
        if self._output.prompt_logprobs is not None:
            self._output.prompt_logprobs = self._sequences[0].prompt_logprobs
        return self._output

    def add(self, sequence: Sequence, sampled: SampledToken) -> tuple[Delta, bool]:
        """Book a token. Returns what it added, and whether a stop string ended the completion here."""
        completion, stream = self._output.completions[sequence.index], self._streams.get(sequence.index)
        if stream is None:
            stream = self._streams[sequence.index] = self._text_stream(sequence)
        # The token that ends a text (end of sequence, stop token) is counted but not shown.
        ends_text = sequence.finish_reason == "stop"
        text = "" if ends_text else stream.add(sampled.token_id)[0]
        if sequence.finish_reason is not None:
            text += stream.flush()
        reason: FinishReason | None = "stop" if stream.stopped else sequence.finish_reason
        if reason == "stop" and sequence.adjustment is not None and sequence.adjustment.failed:
            reason = "error"
        logprobs: tuple[TokenLogprob, ...] = ()
        if completion.logprobs is not None:
            logprobs = (TokenLogprob(sampled.token_id, sampled.logprob, sampled.top),)
            completion.logprobs.extend(logprobs)
        completion.text += text
        completion.token_ids.append(sampled.token_id)
        if completion.queue_seconds is None and sequence.started_at is not None:
            completion.queue_seconds = sequence.started_at - sequence.arrival
        completion.finish_reason, completion.stop_string = reason, stream.stopped_by
        prompt_logprobs = tuple(sequence.prompt_logprobs) if len(completion.token_ids) == 1 else ()
        delta = Delta(sequence.request_id, sequence.index, text, (sampled.token_id,), logprobs, reason, prompt_logprobs)
        return delta, stream.stopped

    def fail(self, sequence: Sequence, error: str) -> Delta:
        """End a completion with `error`; the delta has what text was held back for a stop string."""
        completion, stream = self._output.completions[sequence.index], self._streams.get(sequence.index)
        text = "" if stream is None else stream.flush()  # a text begins with its first token
        completion.text += text
        completion.finish_reason, completion.error = "error", error
        return Delta(sequence.request_id, sequence.index, text, (), finish_reason="error", error=error)

    def end(self, sequence: Sequence, reason: FinishReason) -> None:
        """End a completion without a token."""
        completion = self._output.completions[sequence.index]
        if completion.finish_reason is None:
            completion.finish_reason = reason
