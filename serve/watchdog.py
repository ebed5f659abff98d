"""Tells a step that hangs from one that takes long."""

import dataclasses
import time
from collections.abc import Callable

from emoe_jax.engine.vitals import Vitals

PATIENCE_SECONDS = 30.0
FACTOR = 10
"""A step may take so many times what the longest of the last steps took, and `patience` more."""
FIRST_FACTOR = 10
"""The first step, of which nothing is known, gets so many times the patience."""


@dataclasses.dataclass
class Watchdog:
    """Looks at the engine's thread from another one.

    A step hangs when for `patience` seconds, and 10 times the longest of the last steps, it has neither ended nor
    brought an expert in nor waited for the compiler.
    """

    vitals: Callable[[], Vitals]
    patience: float
    """Seconds. 0: no step is ever taken to hang."""
    clock: Callable[[], float] = time.monotonic
    _seen: tuple[object, ...] = ()
    _since: float = 0.0

    def look(self, began: float | None) -> str | None:
        """Why the step that began then hangs, fit for a client; None when it does not, or when there is none."""
        if began is None or not self.patience:
            return None
        vitals, now = self.vitals(), self.clock()
        signs = (began, vitals.progress)
        if signs != self._seen or vitals.compiling:
            self._seen, self._since = signs, now
        silent = now - self._since
        longest = vitals.longest_step
        limit = self.patience * FIRST_FACTOR if longest is None else self.patience + FACTOR * longest
        if silent <= limit:
            return None
        usual = "the first step" if longest is None else f"a step that usually takes {longest:.3g} s at most"
        return f"the engine hangs: {usual} has made no progress for {silent:.3g} s"
