"""What the best experts of a layer cover, as many as it has slots."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Shaped


def best_experts(scores: Shaped[np.ndarray, "*lead M E"], capacities: Sequence[int]) -> Bool[np.ndarray, "*lead M E"]:
    """The experts of the highest scores, as many of each layer as it has slots. Ties go to the lower index."""
    experts = scores.shape[-1]
    order = np.argsort(-scores, axis=-1, kind="stable")
    first = experts * np.arange(scores.size // experts).reshape(*scores.shape[:-1], 1)
    best = np.empty(scores.shape, bool)
    best.ravel()[order + first] = np.arange(experts) < np.asarray(capacities)[:, None]
    return best


def covered(
    wishes: Shaped[np.ndarray, "*lead M E"], scores: Shaped[np.ndarray, "*lead M E"], capacities: Sequence[int]
) -> Shaped[np.ndarray, "*lead"]:
    """Wishes for the best experts by `scores`, in each of `G` cases."""
    return np.asarray((wishes * best_experts(scores, capacities)).sum((-2, -1)))


def coverage(
    wishes: Shaped[np.ndarray, "*lead M E"], scores: Shaped[np.ndarray, "*lead M E"], capacities: Sequence[int]
) -> Shaped[np.ndarray, "*lead"]:
    """Share of the wishes that find their expert when the best ones by `scores` are resident.

    Each case has at least one wish. Worked example, one layer with 2 slots: wishes [3, 1, 0, 4] and scores
    [0.4, 0.1, 0.3, 0.2] make experts 0 and 2 resident, which 3 of 8 wishes are for: 0.375.
    """
    return np.asarray(covered(wishes, scores, capacities) / wishes.sum((-2, -1)))


def expected_coverage(shares: Float[np.ndarray, "M E"], resident: Bool[np.ndarray, "M E"]) -> float:
    """Share of wishes that resident experts cover if each layer's wishes are spread by `shares`, which sum to 1.

    Worked example, one layer: shares [0.5, 0.3, 0.2] and the experts 0 and 2 resident make 0.7.
    """
    return float((shares * resident).sum() / len(shares))
