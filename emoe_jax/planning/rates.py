"""How fast this machine's device is, measured in a few seconds."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from emoe_jax.planning.targets import Target

READ_BYTES = 256 << 20
"""Of the matrix that is read: more than caches hold."""

LINK_BYTES = 64 << 20
PRODUCT_SIZE = 1024


def seconds(call: Callable[[], Any], repetitions: int) -> float:
    """Median time of a call until its results are there, after two that are not timed."""
    taken = []
    for index in range(repetitions + 2):
        began = time.perf_counter()
        jax.block_until_ready(call())
        if index >= 2:
            taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def product_rate(size: int, dtype: str, repetitions: int) -> float:
    """Floating point operations per second of a square matrix product in a dtype."""
    matrix = jnp.ones((size, size), dtype)
    product = jax.jit(lambda x: x @ x)
    return 2 * size**3 / seconds(lambda: product(matrix), repetitions)


def read_bandwidth(nbytes: int = READ_BYTES, repetitions: int = 5) -> float:
    """Bytes per second at which the device reads a float32 matrix of this size to multiply it by a vector, as a step
    does with its weights."""
    width = 4096
    matrix, vector = jnp.ones((max(1, nbytes // (4 * width)), width), jnp.float32), jnp.ones(width, jnp.float32)
    product = jax.jit(jnp.matmul)
    return matrix.nbytes / seconds(lambda: product(matrix, vector), repetitions)


def link_bandwidth(nbytes: int = LINK_BYTES, repetitions: int = 5) -> float:
    """Bytes per second from the host to the device: out of page-locked memory where a device of its own lends any. On a
    CPU, whose memory is the device's, the rate of a copy."""
    device, host = jax.devices()[0], np.ones(nbytes // 4, np.float32)
    if device.platform == "cpu":
        copy = np.empty_like(host)
        return nbytes / seconds(lambda: np.copyto(copy, host), repetitions)
    sharding = jax.sharding.SingleDeviceSharding(device)
    try:
        source = jax.block_until_ready(jax.device_put(host, sharding.with_memory_kind("pinned_host")))
    except (RuntimeError, ValueError):  # a machine that lends no page-locked memory
        source = host
    return nbytes / seconds(lambda: jax.device_put(source, sharding), repetitions)


def this_machine(memory_bytes: int) -> Target:
    """This machine's device with so many bytes for the engine, its rates as measured now. Steps have no overhead."""
    platform = jax.devices()[0].platform
    half = product_rate(PRODUCT_SIZE * 4, "bfloat16", 3) if platform != "cpu" else product_rate(256, "bfloat16", 3)
    return Target(
        name=f"this machine ({jax.devices()[0].device_kind})",
        platform=platform,
        memory_bytes=memory_bytes,
        bandwidth=read_bandwidth(),
        link=link_bandwidth(),
        half_flops=half,
        float32_flops=product_rate(PRODUCT_SIZE, "float32", 5),
    )
