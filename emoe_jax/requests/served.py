"""Logits from which tokens of an answer were drawn, kept until an audit compares them with those of all experts."""

from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped

MOST_KEPT = 32
"""Tokens of one answer whose logits are kept: a row over the vocabulary for each."""
MOST_AUDITED = 16
"""Answers under way whose logits are kept, at most: twice as many as may wait for their audits."""


class ServedLogits:
    """The logits of a uniform sample of an answer's tokens, whatever length it comes to (reservoir sampling).

    Tokens have numbers: 0 is the first of the answer.
    """

    def __init__(self, seed: int):
        self._seed = seed
        self._slots: dict[int, tuple[int, Float[np.ndarray, " V"]]] = {}  # position of the token that was fed, logits
        self.kl: dict[int, float] = {}
        """What an audit found, by position: KL(all experts || as served), in nats."""
        self.agrees: dict[int, bool] = {}
        """By position, whether both have the same most probable token."""

    def slot(self, token: int) -> int | None:
        """Where the logits of a token are kept, in place of what is kept there; None where they are not kept."""
        if token < MOST_KEPT:
            return token
        drawn = int(np.random.default_rng((self._seed, token)).integers(token + 1))
        return drawn if drawn < MOST_KEPT else None

    def keep(self, token: int, position: int, logits: Float[np.ndarray, " V"]) -> None:
        """Keep the logits of a token that `slot` has a place for; `position` is that of the token fed for it."""
        slot = self.slot(token)
        assert slot is not None
        self._slots[slot] = position, logits

    @property
    def positions(self) -> Int[np.ndarray, " n"]:
        """Of the tokens that were fed, ascending."""
        return np.array(sorted(position for position, _ in self._slots.values()), np.int64)

    def logits(self, positions: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n V"]:
        """Those kept for these positions."""
        rows = dict(self._slots.values())
        return np.stack([rows[int(position)] for position in positions])

    def compared(self, positions: Int[np.ndarray, " n"], kl: Float[Any, " R"], agrees: Shaped[Any, " R"]) -> None:
        """Book an audit's findings on some positions, in order. What follows the last of them is padding."""
        for position, each, same in zip(positions, kl, agrees, strict=False):
            self.kl[int(position)], self.agrees[int(position)] = float(each), bool(same)
