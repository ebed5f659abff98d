"""What one sequence changes about its logits: penalties, biases, a grammar and forced tokens.

Only the tokens that it has something to say about are kept, and go to the device in steps in which a row asks for
them: a few hundred of a vocabulary of 200,000.
"""

import functools
from collections.abc import Iterable
from collections.abc import Sequence as Rows
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int32, UInt32

from emoe_jax.requests.guide import Guide
from emoe_jax.requests.request import SamplingParams


class TokenChanges(NamedTuple):
    """Tokens, each once, whose logits change."""

    tokens: Int32[np.ndarray, " n"]
    bias: Float32[np.ndarray, " n"]
    """What to add to each."""
    repeated: Bool[np.ndarray, " n"]
    """Which of them the repetition penalty holds back."""


class _GrowingChanges:
    """`TokenChanges` that tokens are added to, one by one."""

    def __init__(self) -> None:
        self._places: dict[int, int] = {}
        self._arrays = TokenChanges(np.zeros(64, np.int32), np.zeros(64, np.float32), np.zeros(64, np.bool_))

    def add(self, token: int, bias: float = 0.0, repeated: bool = False) -> None:
        """Add to what is known of a token."""
        place = self._places.setdefault(token, len(self._places))
        if place == len(self._arrays.tokens):
            self._arrays = TokenChanges(*(np.concatenate([array, np.zeros_like(array)]) for array in self._arrays))
        self._arrays.tokens[place] = token
        self._arrays.bias[place] += bias
        self._arrays.repeated[place] |= repeated

    def view(self) -> TokenChanges:
        """All that was added."""
        return TokenChanges(*(array[: len(self._places)] for array in self._arrays))


class LogitAdjustment:
    """The changes of one sequence to its logits: `changes` of single tokens, by what `repetition` says where they are
    repeated, and only those in `allowed` may come next (a bit for each token; None for all).

    As in vLLM, frequency and presence count the tokens of the answer, repetition those of the prompt too.
    """

    def __init__(self, params: SamplingParams, prompt: Rows[int], vocab_size: int, guide: Guide | None = None):
        self.repetition = params.repetition_penalty
        self._frequency, self._presence = params.frequency_penalty, params.presence_penalty
        self._logit_bias = params.logit_bias
        self._prompt = prompt
        self._vocab_size = vocab_size
        self._guide = guide
        self._forced = params.forced_token_ids
        self._generated: set[int] = set()
        self._num_counted = 0

    @property
    def changes(self) -> TokenChanges:
        """Of single tokens, as of the last `update`. Views, which the next one may change."""
        return self._changes.view()

    @functools.cached_property
    def _changes(self) -> _GrowingChanges:
        """Made when the sequence's first token is chosen: most wait before that, and many never get there."""
        changes = _GrowingChanges()
        for token, bias in self._logit_bias.items():
            changes.add(token, bias)
        if self.repetition != 1:
            self._repeat(changes, dict.fromkeys(self._prompt))
        return changes

    @staticmethod
    def _repeat(changes: _GrowingChanges, tokens: Iterable[int]) -> None:
        for token in tokens:
            changes.add(token, repeated=True)

    @classmethod
    def of(
        cls, params: SamplingParams, prompt: Rows[int], vocab_size: int, guide: Guide | None = None
    ) -> "LogitAdjustment | None":
        """None for parameters that leave the logits as they are."""
        changes = params.adjusts_logits or guide is not None or params.forced_token_ids
        return cls(params, prompt, vocab_size, guide) if changes else None

    def allowed(self, num_sampled: int) -> UInt32[np.ndarray, " W"] | None:
        """Which tokens may follow the first `num_sampled` of the answer, those included that the host has not read."""
        if self._forced:
            token, allowed = self._forced[num_sampled], np.zeros(-(-self._vocab_size // 32), np.uint32)
            allowed[token // 32] = 1 << (token % 32)
            return allowed
        return None if self._guide is None else self._guide.allowed

    @property
    def needs_tokens(self) -> bool:
        """Whether the next token's adjustment depends on tokens that the host has to read first."""
        return not self._forced

    @property
    def guide(self) -> Guide | None:
        """The way through the grammar that the answer has to match; None where there is none."""
        return self._guide

    @property
    def pending(self) -> bool:
        """Whether `allowed` is still being computed."""
        return self._guide is not None and self._guide.computing is not None

    @property
    def failed(self) -> bool:
        """Whether the grammar that the answer has to match could not be followed to its end."""
        return self._guide is not None and self._guide.failed

    def update(self, generated: Rows[int]) -> None:
        """Count the tokens of the answer that have not been counted yet."""
        new = generated[self._num_counted :]
        if self._frequency or self._presence:
            for token in new:
                first = token not in self._generated
                self._changes.add(token, -self._frequency - self._presence * first)
                self._generated.add(token)
        if self.repetition != 1:
            self._repeat(self._changes, new)
        if new and self._guide is not None:
            self._guide.update(new)
        self._num_counted = len(generated)
