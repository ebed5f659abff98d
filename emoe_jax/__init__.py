"""eMoE-JAX: Mixture-of-Experts inference from a fixed-capacity expert slab."""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from emoe_jax.engine.engine import Engine
    from emoe_jax.engine_config import EngineConfig
    from emoe_jax.errors import CapacityError, CheckpointError, ConfigError, EmoeError, RequestError
    from emoe_jax.requests.request import SLO, Completion, Delta, RequestOutput, SamplingParams, TokenLogprob
    from emoe_jax.requests.structured_params import StructuredOutputsParams

    __version__: str
    """Of the installed package; `pyproject.toml` has it."""

_HOMES = {
    "emoe_jax.engine.engine": ("Engine",),
    "emoe_jax.engine_config": ("EngineConfig",),
    "emoe_jax.errors": ("CapacityError", "CheckpointError", "ConfigError", "EmoeError", "RequestError"),
    "emoe_jax.requests.request": ("SLO", "Completion", "Delta", "RequestOutput", "SamplingParams", "TokenLogprob"),
    "emoe_jax.requests.structured_params": ("StructuredOutputsParams",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "SLO",
    "CapacityError",
    "CheckpointError",
    "Completion",
    "ConfigError",
    "Delta",
    "EmoeError",
    "Engine",
    "EngineConfig",
    "RequestError",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
    "TokenLogprob",
]


def __getattr__(name: str) -> Any:
    """Import what is asked for: layers without JAX are imported without it."""
    if name == "__version__":
        return importlib.metadata.version("emoe-jax")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
