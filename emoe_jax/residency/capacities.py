"""How many of a budget's slots each layer gets: where another slot covers most, and not evenly."""

import numpy as np
from jaxtyping import Float

from emoe_jax.traces.coverage import coverage

WORTHWHILE = 0.002
"""Coverage that an uneven split must gain over an even one; it costs more executables."""


def split_slots(total: int, shares: Float[np.ndarray, "P M E"], fewest: int) -> list[int]:
    """`total` slots over `M` layers such that the expected coverage is highest.

    `shares` are the experts' shares in `P` situations (tasks), each of which fills the slots with its own best
    experts; each layer gets at least `fewest` slots and at most `E`. Coverage has diminishing returns in every layer,
    so giving slot after slot to where it gains most is optimal. Returns the even split unless another is `WORTHWHILE`.

    A layer's sensitivity has no say. Where routers use their experts evenly, the most sensitive layers would get nearly
    all slots, and answers suffer more from the layers that are left with few (docs/explanation/quality.md).
    Raises `ValueError` when `total` is out of these bounds.
    """
    _, M, E = shares.shape
    if not M * fewest <= total <= M * E:
        raise ValueError(f"{total} slots for {M} layers of {E} experts, at least {fewest} each")
    gains = _gains(shares)
    free = gains[:, fewest:]
    order = np.argsort(-free, axis=None, kind="stable")[: total - M * fewest]
    split = (fewest + np.bincount(order // max(1, free.shape[1]), minlength=M)).tolist()
    even = [total // M + (layer < total % M) for layer in range(M)]
    gained = float(np.mean(coverage(shares, shares, split) - coverage(shares, shares, even)))
    return split if gained > WORTHWHILE else even


def _gains(shares: Float[np.ndarray, "P M E"]) -> Float[np.ndarray, "M E"]:
    """What a layer's first, second, ... slot covers of all assignments; falls along each row."""
    return -np.sort(-shares, axis=2).mean(0) / shares.shape[1]
