"""How many tokens will want each expert: eMoE eq. 2."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from emoe_jax.scheduling.lengths import remaining_tokens


class RequestProgress(NamedTuple):
    """Tokens of a request's prompt that are computed, or will be when the step at hand is done; and of its answer."""

    input_tokens: int = 0
    output_tokens: int = 0


@dataclasses.dataclass(frozen=True)
class Demand:
    """What one scheduled or running request is expected to ask for."""

    input_tokens: int
    output_tokens: float
    """Expected, of its task: `W_o`."""
    sensitivity: Float[np.ndarray, " M"]
    """`s` of its task in each layer, 0 to 1."""
    shares: Float[np.ndarray, "M E"]
    """Predicted share of each expert; each layer sums to 1."""

    def tokens_left(self, progress: RequestProgress) -> float:
        """`W_j + W_o`, less what needs no experts any more; an answer longer than expected goes on as in eq. 3."""
        left = remaining_tokens(self.output_tokens, progress.output_tokens)
        return max(0, self.input_tokens - progress.input_tokens) + left


def expected_tokens(requests: Sequence[Demand], tokens: Float[np.ndarray, " requests"]) -> Float[np.ndarray, "M E"]:
    """`N_i = (sum_j W_j + T W_o) s f_i` (eMoE eq. 2), summed over task types.

    Written as a sum over requests, whose shares may differ within a task; `tokens` is `W_j + W_o` of each. At least one
    request is needed.
    """
    sensitivity = np.stack([request.sensitivity for request in requests])
    return np.einsum("rm,rme->me", tokens[:, None] * sensitivity, np.stack([request.shares for request in requests]))


def expected_rates(
    requests: Sequence[Demand], tokens: Float[np.ndarray, " requests"], top_k: int
) -> Float[np.ndarray, "M E"]:
    """Wishes per step while every request feeds one token a step: eq. 2's proportions, `top_k` per request in all.

    A layer to which no request is sensitive has their plain proportions, so that a prior is at hand there too.
    """
    rates = expected_tokens(requests, tokens)
    total = rates.sum(axis=1, keepdims=True)
    if (total > 0).all():
        shares = rates / total
    else:
        plain = np.mean([request.shares for request in requests], axis=0)
        shares = np.where(total > 0, rates / np.where(total > 0, total, 1), plain)
    return (top_k * len(requests) * shares).astype(np.float32)


def mean_sensitivity(requests: Sequence[Demand], tokens: Float[np.ndarray, " requests"]) -> Float[np.ndarray, " M"]:
    """`s` in each layer averaged over the expected tokens."""
    return (tokens @ np.stack([request.sensitivity for request in requests]) / tokens.sum()).astype(np.float32)
