"""Ahead-of-time compilation: the engine's jitted functions, one executable per function and shape."""

import threading
from collections.abc import Callable, Hashable
from typing import Any

import jax


class Executables:
    """Compiles a jitted function for a `key` when first asked, from any thread, and runs the result from then on.

    A key stands for everything that shapes a call: whoever calls with the same function and key must pass arguments
    of the same shapes and the same static ones. Unlike the cache of `jax.jit`, executables can be made in parallel and
    without running them.
    """

    def __init__(self) -> None:
        self._compiled: dict[tuple[Any, Hashable], jax.stages.Compiled] = {}
        self._lock = threading.Lock()

    def compile(self, function: Callable[..., Any], key: Hashable, *args: Any, **static: Any) -> jax.stages.Compiled:
        """The executable of a function and key; `args` may be arrays or their `ShapeDtypeStruct`s."""
        compiled = self._compiled.get((function, key))
        if compiled is None:
            compiled = function.lower(*args, **static).compile()  # pyright: ignore[reportFunctionMemberAccess]
            with self._lock:
                self._compiled[function, key] = compiled
        return compiled

    def call(self, function: Callable[..., Any], key: Hashable, *args: Any, **static: Any) -> Any:
        """Run a function; donated arguments are donated."""
        return self.compile(function, key, *args, **static)(*args)
