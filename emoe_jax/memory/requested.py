"""From the options of an engine to its memory plan."""

import functools
from collections.abc import Callable

from emoe_jax.config import ModelConfig
from emoe_jax.engine_config import EngineConfig
from emoe_jax.memory.plan import MemoryPlan


def requested_plan(
    config: ModelConfig, options: EngineConfig, platform: str, device_bytes: int, machine_bytes: int
) -> Callable[..., MemoryPlan]:
    """The memory plan of these options, less what is known of steps (`step_bytes`) and of layers (`spread`)."""
    return functools.partial(
        MemoryPlan.of,
        config,
        platform=platform,
        device_bytes=device_bytes,
        dtype=options.dtype,
        expert_format=options.expert_format,
        expert_memory=options.expert_memory,
        host_memory=options.host_memory,
        machine_bytes=machine_bytes,
        kv_memory=options.kv_memory,
        max_model_len=options.length_limit,
        max_num_seqs=options.step_size(platform).sequences,
        may_trade=options.memory_trade,
    )
