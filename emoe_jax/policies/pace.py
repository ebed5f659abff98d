"""`Pace`: what the host may do as often as it takes no more than a share of the time."""

import contextlib
import time
from collections.abc import Callable, Iterator


class Pace:
    """`due` says whether it is time again; do it within `timed`.

    Worked example: at a share of 0.01, something that takes 0.2 ms may happen every 20 ms. Where steps take longer than
    that it may happen in every step.
    """

    def __init__(
        self, share: float, clock: Callable[[], float] = time.monotonic, work: Callable[[], float] = time.thread_time
    ):
        """Due at once, for its cost is not known yet. Both clocks are in seconds, `work` being the thread's own time:
        a busy machine makes nothing rarer.
        """
        self._share, self._clock, self._work = share, clock, work
        self._cost = 0.0  # decayed mean
        self._next = 0.0

    @property
    def due(self) -> bool:
        """Whether the pause that the last `timed` block earned is over. True before the first block."""
        return self._clock() >= self._next

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Around what is paced."""
        began = self._work()
        try:
            yield
        finally:
            spent = self._work() - began
            self._cost = self._cost + 0.25 * (spent - self._cost) if self._cost else spent
            self._next = self._clock() + self._cost / self._share
