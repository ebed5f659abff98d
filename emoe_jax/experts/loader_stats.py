"""What a loader has done so far."""

import contextlib
import dataclasses
import threading
import time
from collections.abc import Iterator


@dataclasses.dataclass(frozen=True)
class LoaderStats:
    """Totals since the loader was made. `busy_seconds`: time with at least one thread staging. `wait_seconds`: time in
    `load_now`, of which `waited_loads` are the experts.
    """

    loads: int = 0
    loaded_bytes: int = 0
    staged_bytes: int = 0
    busy_seconds: float = 0.0
    commit_seconds: float = 0.0
    retries: int = 0
    failures: int = 0
    cancelled: int = 0
    wasted: int = 0
    waited_loads: int = 0
    wait_seconds: float = 0.0

    @property
    def bandwidth(self) -> float | None:
        """Measured bytes/s from the store to the device while staging; None before the first load."""
        return self.staged_bytes / self.busy_seconds if self.busy_seconds else None


class BusyTime:
    """Adds up the time in which at least one thread is `within` it."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._lock = threading.Lock()
        self._inside = 0
        self._since = 0.0

    @contextlib.contextmanager
    def within(self) -> Iterator[None]:
        """The calling thread is busy until the end of the block."""
        with self._lock:
            if not self._inside:
                self._since = time.perf_counter()
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside:
                    self.seconds += time.perf_counter() - self._since
