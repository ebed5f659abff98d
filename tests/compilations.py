"""What XLA compiles while a test runs."""

import contextlib
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def heard_compilations() -> Iterator[list[str]]:
    """A list that grows by an event for each compilation in any thread, until the block ends.

    Functions that tests before this one have compiled are forgotten: JAX would find them in memory, and say nothing.
    """
    jax.clear_caches()
    heard: list[str] = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if "backend_compile" in event:
            heard.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield heard
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
