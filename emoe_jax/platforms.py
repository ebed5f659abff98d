"""The kinds of device that a function is compiled for.

What differs between platforms goes by the platform when a function is traced. A choice left to the compiler
(`jax.lax.platform_dependent`) would leave a conditional in every lowered step.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import jax

_PLATFORM: ContextVar[str | None] = ContextVar("platform", default=None)


def default_platform() -> str:
    """The platform that is traced for (`tracing_for`), else that of JAX's default device: `cpu`, `cuda`, or another one
    by JAX's name.
    """
    if (platform := _PLATFORM.get()) is not None:
        return platform
    backend = jax.default_backend()
    return "cuda" if backend == "gpu" else backend


@contextlib.contextmanager
def tracing_for(platform: str | None) -> Iterator[None]:
    """Within it `platform` is the default; None changes nothing.

    A jitted function that enters it must have the platform among its static arguments.
    """
    token = _PLATFORM.set(platform or _PLATFORM.get())
    try:
        yield
    finally:
        _PLATFORM.reset(token)
