"""How many tokens will want each expert: eMoE eq. 2."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float


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

    @property
    def tokens(self) -> float:
        return self.input_tokens + self.output_tokens

    @functools.cached_property
    def weighted(self) -> Float[np.ndarray, "M E"]:
        """Its part of eq. 2's sum."""
        return self.tokens * self.sensitivity[:, None] * self.shares


def expected_tokens(requests: Sequence[Demand]) -> Float[np.ndarray, "M E"]:
    """`N_i = (sum_j W_j + T W_o) s f_i` (eMoE eq. 2), summed over task types.

    Written as a sum over requests, whose shares may differ within a task. At least one request is needed.
    """
    return np.sum([request.weighted for request in requests], axis=0)


def expected_rates(requests: Sequence[Demand], top_k: int) -> Float[np.ndarray, "M E"]:
    """Wishes per step while every request feeds one token a step: eq. 2's proportions, `top_k` per request in all.

    A layer to which no request is sensitive has their plain proportions, so that a prior is at hand there too.
    """
    rates = expected_tokens(requests)
    total = rates.sum(axis=1, keepdims=True)
    if (total > 0).all():
        shares = rates / total
    else:
        plain = np.mean([request.shares for request in requests], axis=0)
        shares = np.where(total > 0, rates / np.where(total > 0, total, 1), plain)
    return (top_k * len(requests) * shares).astype(np.float32)


def mean_sensitivity(requests: Sequence[Demand]) -> Float[np.ndarray, " M"]:
    """`s` in each layer averaged over the expected tokens."""
    tokens = np.array([max(request.tokens, 1e-9) for request in requests])
    return (tokens @ np.stack([request.sensitivity for request in requests]) / tokens.sum()).astype(np.float32)
