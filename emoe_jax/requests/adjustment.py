"""What one sequence changes about its logits: penalties, biases, a grammar and forced tokens.

The arrays over the vocabulary are kept on the host, token by token, and go to the device only in steps in which a row
asks for them, so requests without any pay nothing.
"""

import functools
from collections.abc import Sequence as Rows

import numpy as np
from jaxtyping import Bool, Float, UInt32

from emoe_jax.requests.guide import Guide
from emoe_jax.requests.request import SamplingParams


class LogitAdjustment:
    """The changes of one sequence to its logits.

    `bias` is added, `repetition_penalty` holds back the tokens in `seen`, and only those in `allowed` may come next
    (a bit for each token; None for all).

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

    # Made when the sequence's first token is chosen: most sequences wait before that, and many never get there.

    @functools.cached_property
    def bias(self) -> Float[np.ndarray, " V"]:
        """What to add to the logits, by token. The live array: `update` changes it in place."""
        bias = np.zeros(self._vocab_size, np.float32)
        for token, value in self._logit_bias.items():
            bias[token] = value
        return bias

    @functools.cached_property
    def seen(self) -> Bool[np.ndarray, " V"]:
        """Which tokens the repetition penalty holds back. The live array: `update` changes it in place."""
        seen = np.zeros(self._vocab_size, np.bool_)
        seen[list(self._prompt)] = True
        return seen

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
        for token in new:
            self.bias[token] -= self._frequency
            if token not in self._generated:
                self.bias[token] -= self._presence
                self._generated.add(token)
            self.seen[token] = True
        if new and self._guide is not None:
            self._guide.update(new)
        self._num_counted = len(generated)
