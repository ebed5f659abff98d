"""Ahead-of-time compilation: the engine's jitted functions, one executable per function and shape."""

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass
class CacheReads:
    """What was asked of JAX's persistent cache of compiled functions."""

    asked: int = 0
    found: int = 0

    @property
    def all_found(self) -> bool:
        """Whether nothing had to be compiled. False where nothing was asked, as without a cache."""
        return 0 < self.asked == self.found


@contextlib.contextmanager
def cache_reads() -> Iterator[CacheReads]:
    """Counts within it, of all threads."""
    reads = CacheReads()

    def listen(event: str, **_: str | int) -> None:
        reads.asked += event == "/jax/compilation_cache/compile_requests_use_cache"
        reads.found += event == "/jax/compilation_cache/cache_hits"

    jax.monitoring.register_event_listener(listen)
    try:
        yield reads
    finally:
        jax.monitoring.unregister_event_listener(listen)


class Executables:
    """Compiles a jitted function for a `key` when first asked, from any thread, and runs the result from then on.

    A key stands for everything that shapes a call: calls with the same function and key must pass arguments of the
    same shapes and the same static ones. Unlike the cache of `jax.jit`, executables can be made in parallel and
    without running them.
    """

    def __init__(self) -> None:
        self._compiled: dict[tuple[Any, Hashable], jax.stages.Compiled] = {}
        self._sent: dict[tuple[Any, Hashable], int] = {}
        """Bytes of the arguments that come from the host with each call."""
        self._lock = threading.Lock()
        self._compiling = 0
        self.seconds = 0.0
        """What calls took to be compiled, or read from JAX's cache, so far."""

    def compile(self, function: Callable[..., Any], key: Hashable, *args: Any, **static: Any) -> jax.stages.Compiled:
        """The executable of a function and key; `args` may be arrays or their `ShapeDtypeStruct`s."""
        compiled = self._compiled.get((function, key))
        if compiled is None:
            with self._counted():
                compiled = function.lower(*args, **static).compile()  # pyright: ignore[reportFunctionMemberAccess]
            sent = sum(leaf.nbytes for leaf in jax.tree.leaves(args) if isinstance(leaf, np.ndarray))
            with self._lock:
                self._compiled[function, key], self._sent[function, key] = compiled, sent
        return compiled

    @property
    def compiling(self) -> bool:
        """Whether a thread waits for the compiler. From any thread."""
        return self._compiling > 0

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        with self._lock:
            self._compiling += 1
        began = time.monotonic()
        try:
            yield
        finally:
            with self._lock:
                self._compiling -= 1
                self.seconds += time.monotonic() - began

    @property
    def workspace_bytes(self) -> int:
        """The most that one of the executables takes on the device beside arguments that are there, as the compiler
        counts.

        Results that do not take a donated argument's place count twice: those of the step before may not be read yet.
        So do arguments from the host: those of the next step may have come.
        """
        with self._lock:
            sent = [(compiled, self._sent[which]) for which, compiled in self._compiled.items()]
        return max((_workspace_bytes(compiled) + 2 * size for compiled, size in sent), default=0)

    def call(self, function: Callable[..., Any], key: Hashable, *args: Any, **static: Any) -> Any:
        """Run a function; donated arguments are donated."""
        return self.compile(function, key, *args, **static)(*args)


def _workspace_bytes(compiled: jax.stages.Compiled) -> int:
    memory = compiled.memory_analysis()
    if memory is None:  # a backend that does not tell
        return 0
    results = max(0, memory.output_size_in_bytes - memory.alias_size_in_bytes)
    return int(memory.temp_size_in_bytes + 2 * results)
