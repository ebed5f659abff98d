"""How slow the machine is at the moment, so that a bound on CPU seconds holds on a shared one too."""

import time

_QUIET_SECONDS = 0.0275  # of one `_work` on a quiet core of the machine that the bounds were measured on


def slowness() -> float:
    """1 where plain Python runs as on a quiet core, 2 where it takes twice as long; never below 1."""
    return max(1.0, max(_work() for _ in range(3)) / _QUIET_SECONDS)


def _work() -> float:
    start = time.process_time()
    counts: dict[int, int] = {}
    for index in range(300_000):
        counts[index & 1023] = counts.get(index & 511, 0) + 1
    return time.process_time() - start
