"""What XLA compiles while a test runs, and what that costs."""

import contextlib
import os
import subprocess
import sys
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


UNOPTIMISED = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
"""Environment of processes that compile more than they compute: JAX has LLVM optimise nothing."""

CHEAP = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
"""Flags under which XLA compiles a step of a tiny model for a CPU in a third of the time."""


def compile_cheaply() -> None:
    """Have XLA compile for a CPU under `CHEAP`, here and in the processes that start from here, if it knows the flags.

    Called before JAX starts its backend, which reads them once, and ends the process where it does not know one.
    """
    given = os.environ.get("XLA_FLAGS", "")
    if CHEAP not in given:  # else this process has them of the one that started it
        flags = f"{given} {CHEAP}".strip()
        start = [sys.executable, "-c", "import jax; jax.devices()"]
        if not subprocess.run(start, env=os.environ | {"XLA_FLAGS": flags}, capture_output=True).returncode:
            os.environ["XLA_FLAGS"] = flags
