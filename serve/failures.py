"""Answers that ended because the model's own numbers did not hold, as clients are told of them."""

from collections.abc import Sequence

from emoe_jax.requests.request import Completion, RequestOutput
from serve.refusals import EngineFailure


def early_end(error: str) -> EngineFailure:
    """What is wrong with an answer that a completion's or a delta's `error` ended."""
    return EngineFailure(f"the answer ended early: {error}")


def failure_of(completion: Completion) -> EngineFailure | None:
    """Why an answer failed, for an API that has no reason to stop for that."""
    if completion.finish_reason != "error":
        return None
    return early_end(completion.error or "what it has to match became too costly to follow")


def check_answered(outputs: Sequence[RequestOutput]) -> None:
    """Raise `EngineFailure` where a request got no token at all; others say `error` in the choices that failed."""
    completions = [completion for output in outputs for completion in output.completions]
    errors = [completion.error for completion in completions if completion.error is not None]
    if errors and not any(completion.token_ids for completion in completions):
        raise early_end(errors[0])
