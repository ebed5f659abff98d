"""The counts of a lowered function, on loops, conditionals and callbacks of every kind."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import export

from tests.lowering import Counts, export_for_cuda

X: Any = jax.ShapeDtypeStruct((4,), jnp.float32)
N: Any = jax.ShapeDtypeStruct((), jnp.int32)


def double(_: Any, x: jax.Array) -> jax.Array:
    return x * 2


def downwards(x: jax.Array, n: jax.Array) -> jax.Array:
    del n
    return jax.lax.while_loop(lambda c: c[0] > 0, lambda c: (c[0] - 1, c[1] * 2), (9, x))[1]


def moving_bound(x: jax.Array, n: jax.Array) -> jax.Array:
    """The bound begins as a constant, and the loop's body moves it."""
    return jax.lax.while_loop(lambda c: c[0] < c[1], lambda c: (c[0] + 1, c[1] - n, c[2] * 2), (0, 9, x))[2]


def moving_step(x: jax.Array, n: jax.Array) -> jax.Array:
    return jax.lax.while_loop(lambda c: c[0] < 9, lambda c: (c[0] + n, c[1] * 2), (jnp.int32(0), x))[1]


def multiplied(x: jax.Array, n: jax.Array) -> jax.Array:
    del n
    return jax.lax.while_loop(lambda c: c[0] < 9, lambda c: (c[0] * 2, c[1] * 2), (jnp.int32(1), x))[1]


def until_large(x: jax.Array, n: jax.Array) -> jax.Array:
    del n
    return jax.lax.while_loop(lambda x: jnp.sum(x) < 9, lambda x: x * 2, x)


def traced_inside_counted(x: jax.Array, n: jax.Array) -> jax.Array:
    """The inner loop's bound is the outer loop's counter."""
    return jax.lax.fori_loop(0, 5, lambda i, x: jax.lax.fori_loop(0, i + n, double, x), x)


LOOPS: dict[str, tuple[Callable[[jax.Array, jax.Array], jax.Array], int, int]] = {
    "static bounds": (lambda x, n: jax.lax.fori_loop(2, 5, double, x), 0, 1),
    "scan": (lambda x, n: jax.lax.scan(lambda c, y: (c + y, c), x, x)[0], 0, 1),
    "map": (lambda x, n: jax.lax.map(lambda v: v * 2, x), 0, 1),
    "downwards": (downwards, 0, 1),
    "searchsorted": (lambda x, n: jnp.searchsorted(x, x).astype(jnp.float32), 0, 1),
    "traced stop": (lambda x, n: jax.lax.fori_loop(0, n, double, x), 1, 0),
    "traced start": (lambda x, n: jax.lax.fori_loop(n, 9, double, x), 1, 0),
    "moving bound": (moving_bound, 1, 0),
    "moving step": (moving_step, 1, 0),
    "multiplied counter": (multiplied, 1, 0),
    "until large": (until_large, 1, 0),
    "traced inside counted": (traced_inside_counted, 1, 1),
    "none": (lambda x, n: jnp.sort(x) + jnp.sum(x), 0, 0),
}


@pytest.mark.parametrize("name", LOOPS)
def test_loops(name: str) -> None:
    function, traced, counted = LOOPS[name]
    counts = Counts.of(export_for_cuda(jax.jit(function), X, N))
    assert (counts.traced_loops, counts.counted_loops) == (traced, counted)
    assert (counts.conditionals, counts.callbacks, counts.kernels) == (0, 0, 0)


def test_a_cumulative_sum_is_no_traced_loop() -> None:
    """With JAX 0.12 it may be a loop, whose trips are the size of an axis."""
    assert Counts.of(export_for_cuda(jax.jit(jnp.cumsum), X)).traced_loops == 0


def test_conditionals() -> None:
    def branches(x: jax.Array, n: jax.Array) -> jax.Array:
        x = jax.lax.cond(n > 2, lambda x: x, lambda x: x * 2, x)
        return jax.lax.switch(n, [lambda x: x, lambda x: x * 3, lambda x: x * 5], x)

    assert Counts.of(export_for_cuda(jax.jit(branches), X, N)).conditionals == 2


def test_callbacks() -> None:
    """JAX lowers a callback only for the platform that it runs on."""

    def asks_the_host(x: jax.Array) -> jax.Array:
        jax.debug.callback(print, x)
        return jax.pure_callback(lambda v: v, X, x)

    text = jax.jit(asks_the_host).lower(X).as_text()
    assert Counts.of_text(text).callbacks == 2


def test_arguments_and_sorts() -> None:
    def uses_two(x: jax.Array, unused: jax.Array, pair: tuple[jax.Array, jax.Array]) -> jax.Array:
        return jax.jit(jnp.sort)(x) + pair[0]

    counts = Counts.of(export_for_cuda(jax.jit(uses_two), X, X, (X, X)))
    assert (counts.arguments, counts.sorts) == (2, 1)


def test_an_exported_module_is_read_whatever_its_attributes_are() -> None:
    exported = export.export(jax.jit(jnp.sin), platforms=["cuda", "cpu"])(X)
    assert Counts.of(exported).traced_loops == 0
