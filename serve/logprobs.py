"""Log-probabilities in OpenAI's two shapes."""

from collections.abc import Callable, Sequence

from emoe_jax.engine.request import TokenLogprob
from serve.answers import ChatLogprob, ChatLogprobs, CompletionLogprobs, TopLogprob

LOWEST_LOGPROB = -9999.0
"""Stands for -inf, which JSON cannot express (vLLM's convention)."""

TokenText = Callable[[int], str]


def completion_logprobs(
    items: Sequence[TokenLogprob], token_text: TokenText, offset: int, opening: int | None = None
) -> CompletionLogprobs:
    """`offset` is where the first token's text begins in the answer, in characters; negative when the answer does not
    show all of it. `opening` is the token before `items` of which nothing is known.
    """
    unknown = [] if opening is None else [None]
    tokens = [token_text(token) for token in ([] if opening is None else [opening])]
    tokens += [token_text(item.token_id) for item in items]
    offsets = []
    for token in tokens:
        offsets.append(max(0, offset))
        offset += len(token)
    return CompletionLogprobs(
        text_offset=offsets,
        tokens=tokens,
        token_logprobs=[*unknown, *(max(item.logprob, LOWEST_LOGPROB) for item in items)],
        top_logprobs=[*unknown, *(_by_text(item, token_text) for item in items)],
    )


def _by_text(item: TokenLogprob, token_text: TokenText) -> dict[str, float]:
    """Best first; of tokens with equal text the likeliest stays. The sampled token is always included."""
    candidates = sorted({*item.top, (item.token_id, item.logprob)}, key=lambda candidate: -candidate[1])
    result: dict[str, float] = {}
    for token_id, logprob in candidates:
        result.setdefault(token_text(token_id), max(logprob, LOWEST_LOGPROB))
    return result


def chat_logprobs(items: Sequence[TokenLogprob], token_text: TokenText) -> ChatLogprobs:
    content = [
        ChatLogprob(
            **_entry(item.token_id, item.logprob, token_text).model_dump(),
            top_logprobs=[_entry(token_id, logprob, token_text) for token_id, logprob in item.top],
        )
        for item in items
    ]
    return ChatLogprobs(content=content)


def _entry(token_id: int, logprob: float, token_text: TokenText) -> TopLogprob:
    token = token_text(token_id)
    return TopLogprob(token=token, bytes=list(token.encode()), logprob=max(logprob, LOWEST_LOGPROB))
