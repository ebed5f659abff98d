"""How well the resident experts predict a text, against all experts."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Float

from emoe_jax.errors import RequestError

_ROWS = 512
"""Rows of logits that are on the device together."""


@dataclasses.dataclass(frozen=True)
class Quality:
    """Of one text under the experts that were resident when it was read."""

    perplexity: float
    full_perplexity: float
    """Under `exact` routing."""
    kl: float
    """Mean over positions of KL(full || resident), in nats."""

    @property
    def perplexity_ratio(self) -> float:
        """Perplexity under the resident experts over that under all; 1 is no loss, more is worse."""
        return self.perplexity / self.full_perplexity

    @classmethod
    def of(
        cls, token_ids: Sequence[int], resident: Float[np.ndarray, "T V"], full: Float[np.ndarray, "T V"]
    ) -> "Quality":
        """From the logits of two or more tokens under both contracts; `RequestError` where they are not finite."""
        for contract, logits in (("resident", resident), ("exact", full)):
            lost = np.flatnonzero(~np.isfinite(logits[:-1]).all(axis=-1))
            if len(lost):
                message = f"the model's logits under {contract!r} are not finite from token {lost[0]} on"
                raise RequestError(message, param="text")
        count = len(token_ids) - 1
        ours, theirs, kl = np.zeros(count), np.zeros(count), np.zeros(count)
        for first in range(0, count, _ROWS):
            rows = slice(first, min(first + _ROWS, count))
            at = np.arange(rows.stop - first), np.asarray(token_ids[first + 1 : rows.stop + 1])
            our, their = (np.asarray(jax.nn.log_softmax(logits[rows], axis=-1)) for logits in (resident, full))
            ours[rows], theirs[rows] = our[at], their[at]
            kl[rows] = (np.exp(their) * (their - our)).sum(axis=-1)
        return cls(float(np.exp(-ours.mean())), float(np.exp(-theirs.mean())), float(kl.mean()))
