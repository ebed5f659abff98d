"""Penalties, biases, grammars and forced tokens of a batch, applied to its logits before tokens are chosen."""

import dataclasses
from collections.abc import Sequence as Rows

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt32

from emoe_jax.requests.adjustment import LogitAdjustment
from emoe_jax.requests.sequence import Sequence


def adjustments_of(sequences: Rows[Sequence], size: int) -> "Adjustments | None":
    """What changes the logits of these sequences' next tokens, padded to `size` rows; None where nothing does."""
    for sequence in sequences:
        if sequence.adjustment is not None:
            sequence.adjustment.update(sequence.generated)
    return Adjustments.of(
        [sequence.adjustment for sequence in sequences], [sequence.num_sampled for sequence in sequences], size
    )


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
        bits = (jnp.asarray(self.allowed)[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)[None, None, :]) & 1
        return jnp.where(bits.reshape(len(logits), -1)[:, : logits.shape[1]] == 1, adjusted, -jnp.inf)
