"""Penalties, biases, grammars and forced tokens: what requests change about logits before a token is chosen.

The arrays over the vocabulary are kept on the host, token by token, and go to the device only in steps in which a row
asks for them, so requests without any pay nothing.
"""

import dataclasses
import functools
from collections.abc import Sequence as Rows

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt32

from emoe_jax.engine.guide import Guide
from emoe_jax.engine.request import SamplingParams


class LogitAdjustment:
    """What one sequence adds to its logits (`bias`), which tokens its `repetition_penalty` holds back (`seen`), and
    which may come next at all (`allowed`, a bit each; None for all).

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
        bias = np.zeros(self._vocab_size, np.float32)
        for token, value in self._logit_bias.items():
            bias[token] = value
        return bias

    @functools.cached_property
    def seen(self) -> Bool[np.ndarray, " V"]:
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
        """The way through what the answer has to match, if it has to match anything."""
        return self._guide

    @property
    def pending(self) -> bool:
        """Whether `allowed` is still being computed."""
        return self._guide is not None and self._guide.computing is not None

    @property
    def failed(self) -> bool:
        """Whether what the answer has to match could not be followed to its end."""
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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adjustments:
    """The adjustments of `B` rows; rows without one keep their logits, bit for bit."""

    bias: Float[Array | np.ndarray, "B V"]
    seen: Bool[Array | np.ndarray, "B V"]
    repetition: Float[Array | np.ndarray, " B"]
    allowed: UInt32[Array | np.ndarray, "B W"]
    """A bit per token, the lowest first."""

    @classmethod
    def none(cls, size: int, vocab_size: int) -> "Adjustments":
        """NumPy arrays that change nothing."""
        return cls(
            np.zeros((size, vocab_size), np.float32),
            np.zeros((size, vocab_size), np.bool_),
            np.ones(size, np.float32),
            np.full((size, -(-vocab_size // 32)), 2**32 - 1, np.uint32),
        )

    @classmethod
    def of(cls, rows: Rows[LogitAdjustment | None], num_sampled: Rows[int], size: int) -> "Adjustments | None":
        """The rows in order, each with the number of answer tokens before it, padded to `size`; None when no row has an
        adjustment.
        """
        vocab_size = next((len(row.bias) for row in rows if row is not None), None)
        if vocab_size is None:
            return None
        arrays = cls.none(size, vocab_size)
        for index, row in enumerate(rows):
            if row is not None:
                arrays.bias[index], arrays.seen[index], arrays.repetition[index] = row.bias, row.seen, row.repetition
                if (allowed := row.allowed(num_sampled[index])) is not None:
                    arrays.allowed[index] = allowed
        return arrays

    def apply(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        """Repetition divides positive logits of seen tokens and multiplies negative ones; then the bias is added, and
        what is not allowed becomes impossible.

        Worked example, repetition 2, tokens 0 and 1 seen, bias -1 on token 2: [4, -1, 3] -> [2, -2, 2].
        """
        repetition = jnp.asarray(self.repetition)[:, None]
        repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
        adjusted = jnp.where(self.seen, repeated, logits) + self.bias
        bits = (jnp.asarray(self.allowed)[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
        return jnp.where(bits.reshape(len(logits), -1)[:, : logits.shape[1]] == 1, adjusted, -jnp.inf)
