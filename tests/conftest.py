"""Settings of the whole suite."""

import functools
import gc
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import optax
import pytest
from hypothesis import settings

from tests.compilations import compile_cheaply
from tests.engines import engine_of, tiny_checkpoint

__all__ = ["engine_of", "tiny_checkpoint"]

compile_cheaply()

# Machines are shared: how long an example takes says nothing.
settings.register_profile("suite", deadline=None)
settings.load_profile("suite")

# Arrays of different ranks or dtypes that meet without a word are a fault more often than a wish.
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


def _promoting(make: Callable[..., optax.GradientTransformation]) -> Callable[..., optax.GradientTransformation]:
    """An optimizer of optax may promote dtypes: it divides its integer count of steps by floats."""

    @functools.wraps(make)
    def made(*arguments: Any, **options: Any) -> optax.GradientTransformation:
        start, update = make(*arguments, **options)

        def promoting_update(*arguments: Any, **options: Any) -> Any:
            with jax.numpy_dtype_promotion("standard"):
                return update(*arguments, **options)

        return optax.GradientTransformation(start, promoting_update)

    return made


optax.adamw = _promoting(optax.adamw)


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Engines of many tests compile the same steps. A cache for the session compiles them once for all workers, and
    for the processes that tests start.

    With `JAX_COMPILATION_CACHE_DIR` set, that cache serves later sessions too.
    """
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    options = {
        "jax_compilation_cache_dir": os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(shared / "xla"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in options.items():
            jax.config.update(name, value)
            patch.setenv(name.upper(), str(value))
        yield
    jax.config.update("jax_compilation_cache_dir", None)


@pytest.fixture(scope="session", autouse=True)
def quick_compilations() -> Iterator[None]:
    """Steps of engines, which are compiled ahead, do without LLVM's optimisations on a CPU: tests compile many and run
    each of them for moments.
    """
    compile_ahead = jax.stages.Lowered.compile

    def compile_quickly(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
        options: Any = {"xla_backend_optimization_level": 0}
        return compile_ahead(lowered, compiler_options=options)

    with pytest.MonkeyPatch.context() as patch:
        if jax.default_backend() == "cpu":
            patch.setattr(jax.stages.Lowered, "compile", compile_quickly)
        yield


@pytest.fixture(scope="module", autouse=True)
def released_executables() -> Iterator[None]:
    """Each compiled step maps memory, and a process may have about 65,000 maps: XLA crashes beyond. So the executables
    of a module go with it; those that another module needs come from the compilation cache.
    """
    yield
    jax.clear_caches()
    gc.collect()


def pytest_collection_finish() -> None:
    """What all tests import stays: no later collection of garbage looks at these millions of objects again. Tracing
    makes many objects, so collections begin after more of them than usual.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000)
