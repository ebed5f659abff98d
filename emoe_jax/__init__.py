"""eMoE-JAX: Mixture-of-Experts inference from a fixed-capacity expert slab."""

from emoe_jax.engine.engine import Engine
from emoe_jax.engine.request import SLO, Completion, Delta, RequestOutput, SamplingParams, TokenLogprob
from emoe_jax.engine.structured import StructuredOutputsParams
from emoe_jax.errors import CapacityError, CheckpointError, ConfigError, EmoeError, RequestError

__all__ = [
    "SLO",
    "CapacityError",
    "CheckpointError",
    "Completion",
    "ConfigError",
    "Delta",
    "EmoeError",
    "Engine",
    "RequestError",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
    "TokenLogprob",
]
