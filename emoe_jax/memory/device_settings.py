"""What XLA is told of a GPU's memory. It reads the environment once, when JAX starts its backend."""

import importlib.util
import math
import os
import pkgutil
from collections.abc import Mapping

POOL_SHARE = 0.9
"""Of a GPU's memory, what JAX's pool takes. JAX itself would take 75 %. The rest is for the CUDA context, libraries and
a display."""

JAX_POOL_SHARE = 0.75
"""What JAX takes where nothing is said."""

_SHARE = "XLA_CLIENT_MEM_FRACTION"
_OLD_SHARE = "XLA_PYTHON_CLIENT_MEM_FRACTION"  # read by all versions that are supported; both together are an error
_PINNED_LIMIT = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"
# What makes the share meaningless: memory is taken bit by bit, or by another allocator.
_OTHER_WAYS = ("XLA_PYTHON_CLIENT_PREALLOCATE", "XLA_PYTHON_CLIENT_ALLOCATOR")
_PLUGINS, _GPU_PLUGINS = "jax_plugins", ("xla_cuda", "xla_rocm")  # the package in which JAX looks, and in it
_GPU_NAMES = {"gpu", "cuda", "rocm"}


def prepare_devices(machine_bytes: int) -> None:
    """Before JAX starts its backend: have a GPU's pool take `POOL_SHARE` of it, and page-locked memory be limited by
    the memory plan alone. XLA's own limit is 64 GB. Without effect once JAX has a device.
    """
    os.environ.update(gpu_settings(os.environ, machine_bytes, has_gpu_plugin()))


def gpu_settings(environment: Mapping[str, str], machine_bytes: int, has_plugin: bool) -> dict[str, str]:
    """The variables to set, of those that the user has not set. None where JAX will not look for a GPU.

    `machine_bytes` is the machine's memory, `has_plugin` says whether a plugin of JAX for GPUs is installed.
    """
    wanted = environment.get("JAX_PLATFORMS", "").lower()
    if not has_plugin or (wanted and _GPU_NAMES.isdisjoint(wanted.split(","))):
        return {}
    settings = {_PINNED_LIMIT: str(math.ceil(machine_bytes / 2**30))}
    if not any(environment.get(name) for name in (_OLD_SHARE, *_OTHER_WAYS)):
        settings[_SHARE] = str(POOL_SHARE)
    return {name: value for name, value in settings.items() if not environment.get(name)}


def has_gpu_plugin() -> bool:
    """Whether JAX could find a GPU here."""
    package = importlib.util.find_spec(_PLUGINS)
    places = [] if package is None else list(package.submodule_search_locations or [])
    return any(module.name.startswith(_GPU_PLUGINS) for module in pkgutil.iter_modules(places))


def pool_share(environment: Mapping[str, str], platform: str) -> float | None:
    """The share of a GPU's memory that JAX's pool takes. None on other devices, and where it takes memory bit by bit.

    `platform` is that of the device, by JAX's name. JAX refuses a share that is no number before this is asked.
    """
    bit_by_bit = environment.get("XLA_PYTHON_CLIENT_PREALLOCATE", "").lower() in ("false", "0")
    other = environment.get("XLA_PYTHON_CLIENT_ALLOCATOR", "default").lower() not in ("default", "bfc")
    if platform not in _GPU_NAMES or bit_by_bit or other:
        return None
    return float(environment.get(_SHARE) or environment.get(_OLD_SHARE) or JAX_POOL_SHARE)
