"""A compiled grammar, and the way of one sequence through it.

Masks are computed on threads beside the engine's: one mask of a costly expression takes tens of milliseconds, and the
library lets other threads run meanwhile. Until its mask is there, a sequence sits out and other sequences go on.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as Rows
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import UInt32

if TYPE_CHECKING:
    from llguidance import LLMatcher

MASK_GRACE = 0.003
"""Seconds from the start of its computation within which a step waits for a mask: nearly all take less than one
thousandth of a second, and their sequences miss no step.
"""
COSTLY = 0.002
"""Seconds of computing from which on a mask counts as costly."""
QUICK_THREADS = 4


class Mask(NamedTuple):
    """Which tokens may come next, a bit each, lowest first; `failed` where the grammar became too costly to follow."""

    allowed: UInt32[np.ndarray, " W"]
    failed: bool


class MaskThreads:
    """Threads for grammars whose last mask was cheap, and others for those whose last mask was costly. The latter are
    few, so that neither cheap masks nor the device's computing on a CPU have to wait for long.
    """

    def __init__(self) -> None:
        costly = max(1, (os.cpu_count() or 1) // 2)
        self.quick = ThreadPoolExecutor(QUICK_THREADS, thread_name_prefix="masks")
        self.costly = ThreadPoolExecutor(costly, thread_name_prefix="costly masks")

    def close(self) -> None:
        """Masks that have not been begun are never computed."""
        for executor in (self.quick, self.costly):
            executor.shutdown(wait=False, cancel_futures=True)


class Grammar:
    """A matcher at its start, which is only copied from here on, and the mask of first tokens. Thread-safe.

    Its masks are computed one after the other: a grammar takes up one thread, however many sequences follow it.
    """

    def __init__(self, matcher: "LLMatcher", num_words: int, threads: MaskThreads):
        """`num_words` are the 32-bit words of a mask."""
        self._matcher = matcher
        self._num_words = num_words
        self._threads = threads
        began = time.thread_time()
        self.first = self._mask(matcher)
        self._is_costly = time.thread_time() - began > COSTLY
        self._lock = threading.Lock()
        self._is_busy = False
        self._asked: deque[tuple[Future[Mask], Guide, list[int]]] = deque()

    def guide(self) -> "Guide":
        """A way through the grammar, at its start."""
        return Guide(self)

    def copy(self) -> "LLMatcher":
        """A matcher at the start, for one sequence to advance. The grammar's own stays where it is."""
        return self._matcher.deep_copy()

    def advance(self, matcher: "LLMatcher", tokens: Rows[int]) -> Mask:
        """Have a copy of the matcher read more tokens: what may follow these."""
        for token in tokens:
            if not matcher.is_stopped():
                matcher.consume_token(token)
        return self._mask(matcher)

    def ask(self, guide: "Guide", tokens: list[int]) -> Future[Mask]:
        """Have `guide.advance(tokens)` called on another thread."""
        asked: Future[Mask] = Future()
        with self._lock:
            self._asked.append((asked, guide, tokens))
            is_first, self._is_busy = not self._is_busy, True
        if is_first:
            self._go_on()
        return asked

    def _go_on(self) -> None:
        threads = self._threads.costly if self._is_costly else self._threads.quick
        threads.submit(self._answer)

    def _answer(self) -> None:
        """Compute the masks that were asked for, one turn at a time while they are costly."""
        while True:
            with self._lock:
                if not self._asked:
                    self._is_busy = False
                    return
                asked, guide, tokens = self._asked.popleft()
            began = time.thread_time()
            try:
                asked.set_result(guide.advance(tokens))
            except BaseException as error:
                asked.set_exception(error)
            was_costly, self._is_costly = self._is_costly, time.thread_time() - began > COSTLY
            if was_costly or self._is_costly:
                self._go_on()
                return

    def _mask(self, matcher: "LLMatcher") -> Mask:
        """Only the end of the text once the grammar is complete, and where it failed."""
        allowed = np.frombuffer(matcher.compute_bitmask(), np.uint32)[: self._num_words]
        return Mask(allowed, matcher.is_error())


class Guide:
    """One sequence's way through a grammar."""

    def __init__(self, grammar: Grammar):
        self._grammar = grammar
        self._matcher: LLMatcher | None = None  # copied when the first token is there: most sequences wait for long
        self._mask = grammar.first
        self._asked: Future[Mask] | None = None
        self._since = 0.0

    def update(self, tokens: Rows[int]) -> None:
        """The answer went on with these tokens: start computing what may come after them."""
        self._finish()
        self._since = time.monotonic()
        self._asked = self._grammar.ask(self, list(tokens))

    def advance(self, tokens: Rows[int]) -> Mask:
        """What may come after these tokens; only for the thread that computes masks."""
        if self._matcher is None:
            self._matcher = self._grammar.copy()
        return self._grammar.advance(self._matcher, tokens)

    @property
    def computing(self) -> Future[Mask] | None:
        """The mask being computed, to be waited for beside others; None when `allowed` need not wait."""
        return None if self._asked is None or self._asked.done() else self._asked

    @property
    def grace_ends(self) -> float:
        """When (seconds on the monotonic clock) steps stop waiting for the mask being computed."""
        return self._since + MASK_GRACE

    @property
    def allowed(self) -> UInt32[np.ndarray, " W"]:
        """Which tokens may come next, a bit each, lowest first. Waits for the mask."""
        self._finish()
        return self._mask.allowed

    @property
    def failed(self) -> bool:
        """Whether the grammar has become too costly to follow, so that the answer ends before it matches. Waits."""
        self._finish()
        return self._mask.failed

    def _finish(self) -> None:
        asked, self._asked = self._asked, None
        if asked is not None:
            self._mask = asked.result()


def settle(guides: Iterable[Guide], *, idle: bool) -> None:
    """Give the masks being computed their moment, so that nearly all sequences take part in the next step. With `idle`
    there is nothing else to do: then wait until one of them is there.
    """
    masks = {mask: guide.grace_ends for guide in guides if (mask := guide.computing) is not None}
    if masks:
        done, _ = wait(masks, max(0.0, max(masks.values()) - time.monotonic()))
        if idle and not done:
            wait(masks, return_when=FIRST_COMPLETED)
