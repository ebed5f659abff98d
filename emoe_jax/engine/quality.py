"""What the resident experts make of a text, against what all experts would."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Float

from emoe_jax.errors import RequestError


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
        ours, theirs = (np.asarray(jax.nn.log_softmax(logits[:-1], axis=-1)) for logits in (resident, full))
        at = np.arange(len(token_ids) - 1), np.asarray(token_ids[1:])
        kl = (np.exp(theirs) * (theirs - ours)).sum(axis=-1)
        return cls(float(np.exp(-ours[at].mean())), float(np.exp(-theirs[at].mean())), float(kl.mean()))
