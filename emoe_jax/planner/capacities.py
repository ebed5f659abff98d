"""How many of a budget's slots each layer gets: where another slot covers most, and not evenly."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

WORTHWHILE = 0.002
"""Coverage that an uneven split must gain over an even one; it costs more executables."""


def split_slots(
    total: int,
    shares: Float[np.ndarray, "P M E"],
    sensitivity: Float[np.ndarray, "P M"],
    fewest: int,
) -> list[int]:
    """`total` slots over `M` layers such that the expected coverage, weighted by sensitivity, is highest.

    `shares` are the experts' shares in `P` situations (tasks), each of which fills the slots with its own best
    experts; each layer gets at least `fewest` slots and at most `E`. Coverage has diminishing returns in every layer,
    so giving slot after slot to where it gains most is optimal. Returns the even split unless another is `WORTHWHILE`.
    Raises `ValueError` when `total` is out of these bounds.
    """
    _, M, E = shares.shape
    if not M * fewest <= total <= M * E:
        raise ValueError(f"{total} slots for {M} layers of {E} experts, at least {fewest} each")
    gains = _gains(shares, sensitivity)
    free = gains[:, fewest:]
    order = np.argsort(-free, axis=None, kind="stable")[: total - M * fewest]
    split = fewest + np.bincount(order // max(1, free.shape[1]), minlength=M)
    even = np.full(M, total // M)
    even[: total % M] += 1
    gained = _coverage(split, gains) - _coverage(even, gains)
    return (split if gained > WORTHWHILE else even).tolist()


def expected_coverage(
    capacities: Sequence[int], shares: Float[np.ndarray, "P M E"], sensitivity: Float[np.ndarray, "P M"]
) -> float:
    """Share of the assignments, weighted by sensitivity, that find their expert among each layer's best ones."""
    return _coverage(np.asarray(capacities), _gains(shares, sensitivity))


def _gains(shares: Float[np.ndarray, "P M E"], sensitivity: Float[np.ndarray, "P M"]) -> Float[np.ndarray, "M E"]:
    """What a layer's first, second, ... slot covers of all assignments; falls along each row."""
    best_first = -np.sort(-shares, axis=2)
    weights = sensitivity / max(float(sensitivity.sum()), 1e-12)
    return np.einsum("pm,pme->me", weights, best_first)


def _coverage(capacities: np.ndarray, gains: Float[np.ndarray, "M E"]) -> float:
    within = np.arange(gains.shape[1]) < capacities[:, None]
    return float((gains * within).sum())
