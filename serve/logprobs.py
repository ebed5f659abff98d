"""Log-probabilities in OpenAI's two shapes."""

import codecs
from collections.abc import Sequence

from emoe_jax.requests.request import TokenLogprob
from serve.answers import ChatLogprob, ChatLogprobs, CompletionLogprobs, TopLogprob
from serve.text import TextCodec

LOWEST_LOGPROB = -9999.0
"""Stands for -inf, which JSON cannot express (vLLM's convention)."""


class TokenPlaces:
    """Where the tokens of one answer stand in its text, in the order in which they come.

    A token may be part of a character. It stands where its character does.
    """

    def __init__(self, text: TextCodec, opening: bool, offset: int = 0):
        """`offset` is the place of the first token, negative when the answer does not show all of it. `opening` says
        that the first token begins a text (`TextCodec.begins_text`).
        """
        self._text = text
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.opening = opening
        self.offset = offset

    def add(self, token_id: int, echoed: bool = False) -> int:
        """The character at which the token stands. Special tokens have a text where a prompt is `echoed`."""
        start = self.offset
        own = _echoed(self._text, token_id) if echoed else self._text.token_bytes(token_id, self.opening)
        self.offset += len(self._decoder.decode(own))
        self.opening = self.opening and not own
        return max(0, start)


def characters(text: TextCodec, tokens: Sequence[int]) -> int:
    """Characters of a prompt's tokens, a last one that is not whole included."""
    return len(b"".join(_echoed(text, token) for token in tokens).decode("utf-8", "replace"))


def _echoed(text: TextCodec, token_id: int) -> bytes:
    return text.token_bytes(token_id) or text.token_text(token_id).encode()


def completion_logprobs(
    items: Sequence[TokenLogprob], text: TextCodec, places: TokenPlaces, prompt: Sequence[int] = ()
) -> CompletionLogprobs:
    """`items` are an answer's, or those of an echoed `prompt` and of its answer; nothing is known of a first token."""
    unknown = [None] if prompt else []
    ids = [*prompt[:1], *(item.token_id for item in items)]
    offsets = [places.add(token, echoed=True) for token in prompt]
    if prompt:
        places.opening = text.begins_text(prompt)
    return CompletionLogprobs(
        text_offset=offsets + [places.add(token) for token in ids[len(prompt) :]],
        tokens=[text.token_text(token) for token in ids],
        token_logprobs=[*unknown, *(max(item.logprob, LOWEST_LOGPROB) for item in items)],
        top_logprobs=[*unknown, *(_by_text(item, text) for item in items)],
    )


def _by_text(item: TokenLogprob, text: TextCodec) -> dict[str, float]:
    """Best first; of tokens with equal text the likeliest stays. The sampled token is always included."""
    candidates = sorted({*item.top, (item.token_id, item.logprob)}, key=lambda candidate: -candidate[1])
    result: dict[str, float] = {}
    for token_id, logprob in candidates:
        result.setdefault(text.token_text(token_id), max(logprob, LOWEST_LOGPROB))
    return result


def chat_logprobs(items: Sequence[TokenLogprob], text: TextCodec, places: TokenPlaces) -> ChatLogprobs:
    """The `bytes` of an answer's tokens join to its text. A token that adds nothing to it has none."""
    content = []
    for item in items:
        entries = [_entry(*pair, text, places.opening) for pair in ((item.token_id, item.logprob), *item.top)]
        content.append(ChatLogprob(**entries[0].model_dump(), top_logprobs=entries[1:]))
        places.add(item.token_id)
    return ChatLogprobs(content=content)


def _entry(token_id: int, logprob: float, text: TextCodec, opening: bool) -> TopLogprob:
    own = text.token_bytes(token_id, opening)
    return TopLogprob(token=text.token_text(token_id), bytes=list(own), logprob=max(logprob, LOWEST_LOGPROB))
