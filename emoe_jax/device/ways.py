"""Whole or layer by layer: the way in which a batch whose rows may need absent experts is computed."""

import dataclasses
from typing import Literal

from emoe_jax.device.shapes import Shape

Way = Literal["whole", "layered"]
"""In one call, which is void where an expert that was needed was absent; or with a stop at every router."""

OVERLAP_BELOW = 0.1
"""Share of whole forwards that have to be computed again: beyond it no step is begun that builds on another one."""

_MEMORY = 0.1
"""Weight of the newest measurement in a running mean."""
_LOOK_AGAIN = 32
"""After so many batches of a shape the slower way is tried once more; later less and less often."""
_LOOK_AGAIN_AT_MOST = 1024


@dataclasses.dataclass
class _OfShape:
    seconds: dict[Way, float] = dataclasses.field(default_factory=dict)
    until_look: int = _LOOK_AGAIN
    interval: int = _LOOK_AGAIN


class Ways:
    """Takes the way that took less time for batches of the same shape, loads and repetitions included."""

    def __init__(self) -> None:
        self._shapes: dict[Shape, _OfShape] = {}
        self._repeated = 0.0

    @property
    def overlaps(self) -> bool:
        """Whether the next step may begin before it is known that a whole forward stands."""
        return self._repeated < OVERLAP_BELOW

    def peek(self, shape: Shape) -> Way:
        """The way that `choose` would take now."""
        known = self._shapes.get(shape)
        if known is None or "whole" not in known.seconds:
            return "whole"
        if "layered" not in known.seconds:
            return "layered"
        best = self._best(known)
        return best if known.until_look > 0 else _other(best)

    def choose(self, shape: Shape) -> Way:
        """The way for the next batch of a shape."""
        way = self.peek(shape)
        known = self._shapes.setdefault(shape, _OfShape())
        if len(known.seconds) == 2:
            if known.until_look > 0:
                known.until_look -= 1
            else:
                known.interval = min(2 * known.interval, _LOOK_AGAIN_AT_MOST)
                known.until_look = known.interval
        return way

    def took(self, shape: Shape, way: Way, seconds: float, repeated: bool) -> None:
        """A batch was begun in this way and stood after so many seconds; `repeated`: not with its first forward."""
        known = self._shapes.setdefault(shape, _OfShape())
        before = known.seconds.get(way)
        was_best = self._best(known) if len(known.seconds) == 2 else None
        if before is None or (was_best not in (None, way) and seconds < before):
            known.seconds[way] = seconds  # of the slower way the newest: its first time may be that of a compiler
        else:  # one batch that waited for something else must not count for many
            known.seconds[way] = before + _MEMORY * (min(seconds, 10 * before) - before)
        if was_best is not None and self._best(known) != was_best:
            known.interval = known.until_look = _LOOK_AGAIN
        if way == "whole":
            self._repeated += _MEMORY * (repeated - self._repeated)

    @staticmethod
    def _best(known: _OfShape) -> Way:
        return "whole" if known.seconds["whole"] <= known.seconds["layered"] else "layered"


def _other(way: Way) -> Way:
    return "layered" if way == "whole" else "whole"
