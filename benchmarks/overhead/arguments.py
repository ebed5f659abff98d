"""What arguments of a step cost the host, and what it costs to have fewer, with the weights of layers stacked."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

COUNTS = (40, 300)
"""What a step of few arguments would have, and about what one of 32 layers has."""
_LAYERS, _WIDTH, _ROWS = 8, 1024, 1


def argument_overhead(repetitions: int = 300) -> dict[str, float]:
    """`dispatch_ms_of_N_arguments`, and how many times as long products take whose factors are parts of one argument:
    `sliced_layers_ratio`, unrolled, and `scanned_layers_ratio`.
    """
    results = {f"dispatch_ms_of_{count}_arguments": 1e3 * _seconds_to_dispatch(count, repetitions) for count in COUNTS}
    rng = np.random.default_rng(0)
    layers = [rng.normal(size=(_WIDTH, _WIDTH)).astype(np.float32) / 32 for _ in range(_LAYERS)]
    x = jax.device_put(np.ones((_ROWS, _WIDTH), np.float32))
    apart, stacked = jax.device_put(layers), jax.device_put(np.stack(layers))

    def unrolled(x: jax.Array, factors: Any) -> jax.Array:
        for index in range(_LAYERS):
            x = x @ factors[index]
        return x

    def scanned(x: jax.Array, factors: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda rows, factor: (rows @ factor, None), x, factors)[0]

    base = _median_seconds(jax.jit(unrolled), (x, apart), repetitions)
    results["sliced_layers_ratio"] = _median_seconds(jax.jit(unrolled), (x, stacked), repetitions) / base
    results["scanned_layers_ratio"] = _median_seconds(jax.jit(scanned), (x, stacked), repetitions) / base
    return results


def _seconds_to_dispatch(count: int, repetitions: int) -> float:
    arrays = [jax.device_put(np.zeros(4, np.float32)) for _ in range(count)]
    compiled = jax.jit(lambda arrays: jnp.negative(arrays[0])).lower(arrays).compile()
    times = []
    for _ in range(repetitions):
        began = time.perf_counter()
        result = compiled(arrays)
        times.append(time.perf_counter() - began)
        result.block_until_ready()
    return float(np.median(times))


def _median_seconds(function: Callable[..., jax.Array], arguments: tuple[Any, ...], repetitions: int) -> float:
    function(*arguments).block_until_ready()
    times = []
    for _ in range(repetitions):
        began = time.perf_counter()
        function(*arguments).block_until_ready()
        times.append(time.perf_counter() - began)
    return float(np.median(times))
