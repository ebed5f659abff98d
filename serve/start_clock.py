"""How long the parts of a start take, for the line that a server prints when it is up."""

import time
from collections.abc import Callable

ALL_COMPILED = "all steps are compiled"
"""The line of the log that says so: before or after the server is up."""
REST_FAILED = "what was left of the start failed"
"""The line of the log where the other one never comes."""

BEGAN = time.monotonic()
"""When this module was imported, which `serve.main` does first."""


class StartClock:
    """Parts of a start, one after another. The first one is `imports`, from the start of the process on."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, began: float = BEGAN):
        self._clock = clock
        self._began = self._since = began
        self._part = "imports"
        self._seconds: dict[str, float] = {}

    def begin(self, part: str) -> None:
        """What is done from now on; a no-op for the part that is under way. A part may come again."""
        if part != self._part:
            now = self._clock()
            self._seconds[self._part] = self._seconds.get(self._part, 0.0) + now - self._since
            self._part, self._since = part, now

    def line(self) -> str:
        """`started in 7.1 s: imports 1.9, weights 0.4`, up to now."""
        self.begin("")
        parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in self._seconds.items())
        return f"started in {self._since - self._began:.1f} s: {parts}"
