"""Lowering for CUDA on a machine without a GPU."""

from typing import Any

import jax
from jax import export
from jax.sharding import AbstractDevice, AbstractMesh

_DEVICE = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
_TRITON = export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")


def export_for_cuda(jitted: Any, *arguments: Any, **statics: Any) -> export.Exported:
    """What `jitted` becomes on a GPU. JAX 0.12 wants to know which one before it lowers a Triton kernel."""
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=_DEVICE)):
        return export.export(jitted, platforms=["cuda"], disabled_checks=[_TRITON])(*arguments, **statics)
