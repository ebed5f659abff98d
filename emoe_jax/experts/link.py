"""A link between store and device that is slower than the machine's own: its time is really waited."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from emoe_jax.errors import ConfigError


class ModelledLink:
    """One transfer at a time, each of at least `bytes / bandwidth` seconds. Thread-safe.

    Transfers for which a step waits go first; others in the order in which they came. A transfer that has begun is not
    interrupted. A queued transfer begins when the one before it ends on the link's own clock. A thread that wakes up
    late, as threads do, adds nothing to the time of those behind it.

    Worked example, 1 GB/s: loads of 3 MB asked for at 0 and at 1 ms end at 3 and at 6 ms.
    """

    def __init__(
        self,
        bandwidth: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ):
        """`bandwidth` is in bytes/s. `clock` and `sleep` are in seconds. Raises `ConfigError` unless it is positive."""
        if not bandwidth > 0:
            raise ConfigError(f"a modelled link of {bandwidth:g} bytes/s moves nothing; expected more than 0")
        self._bandwidth = bandwidth
        self._clock = clock
        self._sleep = sleep
        self._freed = threading.Condition()
        self._waiting: list[Callable[[], bool]] = []  # in order of arrival; each says whether a step waits for it now
        self._busy = False
        self._free_at = clock()

    @contextlib.contextmanager
    def transfer(self, nbytes: int, is_urgent: Callable[[], bool]) -> Iterator[None]:
        """Around the real transfer of so many bytes, which is over when the block is left.

        `is_urgent` is asked whenever the link becomes free: a step may begin to wait for a load that is queued.
        """
        asked_at = self._clock()
        with self._freed:
            self._waiting.append(is_urgent)
            self._freed.wait_for(lambda: not self._busy and self._first() is is_urgent)
            self._waiting.remove(is_urgent)
            self._busy = True
        ends_at = max(asked_at, self._free_at) + nbytes / self._bandwidth
        try:
            yield
            ends_at = max(ends_at, self._clock())
            if (left := ends_at - self._clock()) > 0:
                self._sleep(left)
        finally:
            with self._freed:
                self._free_at, self._busy = ends_at, False
                self._freed.notify_all()

    def _first(self) -> Callable[[], bool]:
        return next((waiting for waiting in self._waiting if waiting()), self._waiting[0])
