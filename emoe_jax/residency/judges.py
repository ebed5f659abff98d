"""Whether predictions hold: `Drift` within the prompts they were made for, `Gate` over many of them."""

from __future__ import annotations

import math
from collections import deque


class Drift:
    """Coverage of the last steps' wishes against what the plan promises."""

    def __init__(self, half_life: float = 64.0, tolerance: float = 0.1, patience: int = 128):
        """`half_life` of the mean is in steps. Coverage below the promise by a share of `tolerance` is a drift, once
        `patience` steps have passed since the last `restart`."""
        self.promised: float | None = None
        self.coverage: float | None = None
        self._keep = 0.5 ** (1 / half_life)
        self.tolerance, self._patience = tolerance, patience
        self._steps = 0

    def restart(self) -> None:
        """A new prediction is being made: it gets time to show what it is worth."""
        self.coverage, self._steps = None, 0

    def promise(self, coverage: float) -> None:
        """The present plan expects this coverage, 0 to 1."""
        self.promised = coverage

    def observe(self, wishes: int, covered: int, steps: int = 1) -> None:
        """Wishes of so many steps, and how many of them were resident."""
        if wishes:
            share = covered / wishes
            before = share if self.coverage is None else self.coverage
            keep = self._keep**steps
            self.coverage = keep * before + (1 - keep) * share
            self._steps += steps

    @property
    def drifted(self) -> bool:
        """Whether coverage fell too far below the promise.

        False before a promise, and while fewer than `patience` steps were observed since `restart`.
        """
        if self.promised is None or self.coverage is None or self._steps < self._patience:
            return False
        return self.coverage < (1 - self.tolerance) * self.promised


class Gate:
    """Open while the predictor's sets cover at least what decayed frequency's would have, over the last prompts."""

    def __init__(self, window: int = 64, fewest: int = 16, margin: float = 0.005):
        """Closes when prediction is `margin` behind over the last `window` prompts (at least `fewest`), and opens when
        it is as far ahead."""
        self.is_open = True
        self._fewest, self.margin = fewest, margin
        self._window = window
        self._pairs: deque[tuple[float, float]] = deque()
        self._sums = [0.0, 0.0]

    def observe(self, predicted: float, frequency: float) -> None:
        """Shares of a finished prompt's wishes that prediction and frequency would have covered."""
        dropped = self._pairs.popleft() if len(self._pairs) == self._window else (0.0, 0.0)
        self._pairs.append((predicted, frequency))
        self._sums = [total + new - old for total, new, old in zip(self._sums, self._pairs[-1], dropped, strict=True)]
        if len(self._pairs) >= self._fewest:
            ahead = self.predicted - self.frequency
            if self.is_open and ahead < -self.margin:
                self.is_open = False
            elif not self.is_open and ahead > self.margin:
                self.is_open = True

    @property
    def predicted(self) -> float:
        """Mean coverage of predictions over the window; NaN before the first."""
        return self._sums[0] / len(self._pairs) if self._pairs else math.nan

    @property
    def frequency(self) -> float:
        """The same of decayed frequency."""
        return self._sums[1] / len(self._pairs) if self._pairs else math.nan
