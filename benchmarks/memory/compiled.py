"""What a step takes beside weights, experts and KV cache, known by compiling the engine's steps for a model's shapes.

Nothing is allocated: arrays are shapes. Steps are compiled for this machine's CPU, in float32, because XLA's CPU
backend widens half-precision weights into copies, which a GPU does not.
"""

from __future__ import annotations

import jax
from flax import nnx

from emoe_jax.config import ModelConfig
from emoe_jax.device.executables import Executables
from emoe_jax.device.shapes import Buckets
from emoe_jax.memory.plan import MemoryPlan
from emoe_jax.memory.workspace import step_workspace
from emoe_jax.models.decoder import Decoder

_NO_LIMIT = 2**50
_DTYPE = "float32"


def step_bytes(config: ModelConfig, share: float, batch: int, tokens: int) -> int:
    """Bytes of the larger of two steps: `tokens` of one prompt, or one token of `batch` sequences of that length.

    Two models are compiled, with the first MoE layer and with the first two. Every further layer adds what the second
    one added.
    """
    first, second = (_bytes(_shortened(config, layers), share, batch, tokens) for layers in (1, 2))
    return first + (len(config.moe_layers) - 1) * (second - first)


def _bytes(config: ModelConfig, share: float, batch: int, tokens: int) -> int:
    plan = MemoryPlan.of(
        config,
        platform="cpu",
        device_bytes=_NO_LIMIT,
        dtype=_DTYPE,
        expert_memory=f"{100 * share:.6f}%",
        max_model_len=tokens,
        max_num_seqs=batch,
    )
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    assert all(leaf.dtype == jax.numpy.float32 for leaf in jax.tree.leaves(nnx.state(model)))
    return step_workspace(model, plan, Buckets.of(batch, tokens, tokens), Executables())


def _shortened(config: ModelConfig, moe_layers: int) -> ModelConfig:
    """The same model up to one of its MoE layers."""
    kept = config.moe_layers[:moe_layers]
    layers = kept[-1] + 1
    return config.replace(num_layers=layers, moe_layers=kept, sliding_windows=config.sliding_windows[:layers])
