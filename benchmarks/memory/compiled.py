"""What a step takes beside weights, experts and KV cache, for one prompt or for one token of many sequences."""

from __future__ import annotations

from emoe_jax.config import ModelConfig
from emoe_jax.engine_config import StepSize
from emoe_jax.memory.plan import MemoryPlan
from emoe_jax.planning.compiled import extrapolated

_NO_LIMIT = 2**50


def step_bytes(config: ModelConfig, share: float, batch: int, tokens: int) -> int:
    """Bytes of the larger of two steps: `tokens` of one prompt, or one token of `batch` sequences of that length.

    In float32, as compiled for a CPU.
    """
    plan = MemoryPlan.of(
        config,
        platform="cpu",
        device_bytes=_NO_LIMIT,
        dtype="float32",
        expert_memory=f"{100 * share:.6f}%",
        max_model_len=tokens,
        max_num_seqs=batch,
    )
    return extrapolated(config, plan, StepSize(batch, tokens), "cpu")
