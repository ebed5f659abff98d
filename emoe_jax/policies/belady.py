"""Belady's rule, which knows the future: of the experts that may be resident, those that are wished for soonest."""

import numpy as np
from jaxtyping import Bool, UInt16

NEVER = np.iinfo(np.uint16).max


def next_use(
    wished: Bool[np.ndarray, "steps M E"], after: UInt16[np.ndarray, "M E"] | None = None
) -> UInt16[np.ndarray, "steps M E"]:
    """How many steps from each step until each expert is wished for: 0 in that step itself, `NEVER` after the last.
    `after` is the same of the step that follows these, if one does.

    Worked example, one expert of one layer, wished for in steps 1 and 2 of 4: 1, 0, 0, `NEVER`.
    """
    distances = np.empty(wished.shape, np.uint16)
    later = np.full(wished.shape[1:], NEVER, np.uint16) if after is None else after
    for step in range(len(wished) - 1, -1, -1):
        later = np.where(wished[step], 0, np.minimum(later, NEVER - 1) + 1).astype(np.uint16)
        distances[step] = later
    return distances
