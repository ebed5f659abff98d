"""Threads that bring experts into the host tier before a load asks for them."""

import logging
import threading
import time
from collections.abc import Callable
from typing import Protocol

from emoe_jax.experts.host_tier import ExpertKey

log = logging.getLogger(__name__)


class FilledStore(Protocol):
    """The store as seen from here."""

    def next_fill(self) -> ExpertKey | None:
        """Wait for something to be read in the background. None once the store is closed."""
        ...

    def fill_one(self, layer: int, expert: int) -> None:
        """Read it, and keep it."""
        ...


class TierFiller:
    """Fills a store's host tier until it is closed. With two threads, one reads while the other pins what it has read.

    `share` is the part of the time that a thread works, where there is always something to do: on a CPU, steps need the
    same cores and the same memory. A record that cannot be read is left out: the load that needs it says what is wrong.
    """

    def __init__(
        self, store: FilledStore, threads: int, share: float = 1.0, sleep: Callable[[float], object] = time.sleep
    ):
        self._store, self._share, self._sleep = store, share, sleep
        self._threads = [threading.Thread(target=self._work, name="host-tier", daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def join(self) -> None:
        """Wait for the threads, which end when `next_fill` says so."""
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while (key := self._store.next_fill()) is not None:
            began = time.monotonic()
            try:
                self._store.fill_one(*key)
            except Exception as error:
                log.warning("expert %d of MoE layer %d stays out of host memory: %s", key[1], key[0], error)
            self._sleep((time.monotonic() - began) * (1 / self._share - 1))
