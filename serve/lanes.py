"""Work on texts off the event loop: bounded in bytes, short texts apart from long ones, abandoned work dropped."""

import asyncio
import concurrent.futures
import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar

from serve.refusals import QueueFull

Result = TypeVar("Result")

MAX_WAITING_BYTES = 16 * 2**20
"""Of texts that are worked on or wait for it: a text of the largest body's size, and as much again. A text costs a
tenth of a microsecond to a few microseconds per byte.
"""
TEXT_BYTES = 4096
"""What every text counts for besides its own bytes: some work has next to no text."""
GRAMMAR_BYTES = 2**15
"""What every grammar counts for besides its own bytes: a short one may take seconds to compile."""
SHORT_BYTES = 2**16
"""Longer texts have a thread of their own, behind which no short text waits."""


class Room:
    """Bytes that may wait for something, counted on the event loop. An item counts `item_bytes` besides its own."""

    def __init__(self, max_bytes: int, item_bytes: int, awaited: str):
        """`awaited` is what they wait for, by its name in messages."""
        self._max_bytes = max_bytes
        self._item_bytes = item_bytes
        self._awaited = awaited
        self._held = 0

    @contextlib.contextmanager
    def reserve(self, items: int, size: int) -> Iterator[None]:
        """Room for a request's items of `size` bytes together. Raises `QueueFull` where more would wait than are taken;
        one request alone is always taken.
        """
        cost = size + items * self._item_bytes
        if self._held and self._held + cost > self._max_bytes:
            raise QueueFull(
                f"{self._held} bytes of text wait for the {self._awaited}; with {cost} more they exceed "
                f"{self._max_bytes}"
            )
        self._held += cost
        try:
            yield
        finally:
            self._held -= cost


class TextLanes:
    """Two threads, one for short texts and one for long ones. Lives on the event loop."""

    def __init__(self, max_waiting_bytes: int = MAX_WAITING_BYTES):
        self.reserve = Room(max_waiting_bytes, TEXT_BYTES, "tokenizer").reserve
        self._short = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="short texts")
        self._long = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="long texts")

    async def run(self, size: int, function: Callable[[], Result]) -> Result:
        """The result of `function`, which works on `size` bytes. When the caller is cancelled before the function's
        turn, it is never called.
        """
        executor = self._short if size <= SHORT_BYTES else self._long
        return await asyncio.get_running_loop().run_in_executor(executor, function)

    def close(self) -> None:
        """Drop the work that has not begun. Does not wait for the work that has."""
        for executor in (self._short, self._long):
            executor.shutdown(wait=False, cancel_futures=True)


def size_of(text: str) -> int:
    """Bytes of a text in UTF-8."""
    return len(text) if text.isascii() else len(text.encode(errors="surrogatepass"))
