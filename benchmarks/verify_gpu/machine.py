"""What a run was made with, and how fast its memory and its link are."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from emoe_jax.planning.rates import seconds

_PACKAGES = (
    *("jax", "jaxlib", "flax", "numpy"),
    *(f"jax-cuda{major}-plugin" for major in (12, 13)),
    *(f"nvidia-{name}-cu{major}" for major in (12, 13) for name in ("cudnn", "cuda-runtime", "cublas")),
    *("nvidia-cuda-runtime", "nvidia-cublas"),
)


def versions() -> dict[str, str]:
    """Of Python, the packages that decide what runs, the driver, and the name of the device."""
    found = {"python": platform.python_version(), "device": jax.devices()[0].device_kind}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    found["runtime"] = str(getattr(jax.devices()[0].client, "platform_version", "unknown")).replace("\n", " ")
    if (tool := shutil.which("nvidia-smi")) is not None:
        query = [tool, "--query-gpu=driver_version,compute_cap", "--format=csv,noheader"]
        asked = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
        found["driver, compute capability"] = asked.stdout.strip() or "unknown"
    return found


def bandwidths(nbytes: int, repetitions: int) -> dict[str, float]:
    """Bytes per second: of device memory (read and write), from the host to the device and back.

    `nbytes` is the size of the arrays. From the host twice, out of ordinary memory and out of page-locked memory.
    """
    device = jax.devices()[0]
    array = jax.device_put(jnp.ones(nbytes // 4, jnp.float32), device)
    copied = jax.jit(lambda x: x + 1.0)
    host = np.ones(nbytes // 4, np.float32)
    found = {
        "device_memory": 2 * nbytes / seconds(lambda: copied(array), repetitions),
        "host_to_device": nbytes / seconds(lambda: jax.device_put(host, device), repetitions),
    }
    try:
        sharding = jax.sharding.SingleDeviceSharding(device)
        pinned = jax.device_put(host, sharding.with_memory_kind("pinned_host"))
        found["pinned_host_to_device"] = nbytes / seconds(lambda: jax.device_put(pinned, sharding), repetitions)
    except (RuntimeError, ValueError):  # a machine that lends no page-locked memory
        pass
    fresh = jax.jit(lambda x, c: x + c)  # an array that has been read to the host is kept there
    found["device_to_host"] = nbytes / seconds(_reader(fresh, array), repetitions)
    return found


def _reader(fresh: Callable[..., Any], array: jax.Array) -> Callable[[], Any]:
    count = 0

    def read() -> Any:
        nonlocal count
        count += 1
        return np.asarray(jax.block_until_ready(fresh(array, jnp.float32(count))))

    return read
