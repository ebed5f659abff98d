"""What a policy exchanges before a step when loads take no time: the best absent experts for the worst residents."""

import numpy as np
from jaxtyping import Bool, Float, Int


def exchange(
    resident: Bool[np.ndarray, "policies M E"],
    scores: Float[np.ndarray, "policies M E"],
    loadable: Bool[np.ndarray, "policies M E"],
    margin: Float[np.ndarray, "policies M"],
) -> Int[np.ndarray, " policies"]:
    """Change `resident` in place, for several policies side by side; returns how many experts each of them loads.

    The nth best of the absent experts in `loadable` replaces the nth worst resident where it is ahead by more than
    `margin`, which is never negative. That is what single exchanges, the most gainful first, come to in the end: an
    expert that was evicted is never ahead of the residents that are left. Of equal experts the first one moves.
    """
    gained = np.where(loadable & ~resident, scores, -np.inf)
    lost = np.where(resident, scores, np.inf)
    p, m = np.nonzero(gained.max(-1) - lost.min(-1) > margin)
    moved = np.zeros(len(resident), np.int64)
    if not len(p):
        return moved
    gained, lost = gained[p, m], lost[p, m]
    load, evict = np.argsort(-gained, axis=-1, kind="stable"), np.argsort(lost, axis=-1, kind="stable")
    gains = np.take_along_axis(gained, load, axis=-1) - np.take_along_axis(lost, evict, axis=-1)
    row, nth = np.nonzero(gains > margin[p, m][:, None])
    resident[p[row], m[row], load[row, nth]] = True
    resident[p[row], m[row], evict[row, nth]] = False
    np.add.at(moved, p[row], 1)
    return moved
