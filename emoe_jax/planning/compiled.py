"""What a step takes beside weights, experts and KV cache, known by compiling the engine's steps for a model's shapes.

Nothing is allocated: arrays are shapes. Where this machine has only a CPU, steps are compiled for that, in float32,
because XLA's CPU backend widens half-precision weights into copies, which a GPU does not.
"""

import dataclasses

import jax
from flax import nnx

from emoe_jax.config import ModelConfig
from emoe_jax.device.executables import Executables
from emoe_jax.engine_config import StepSize
from emoe_jax.memory.plan import MemoryPlan
from emoe_jax.memory.workspace import buckets_of, step_workspace
from emoe_jax.models.decoder import Decoder

WHOLE_LAYERS = 8
"""Models of so many MoE layers are compiled as they are; of larger ones, short versions are."""

RETURNED_BYTES = 4
"""What a step returns of each choice of a router, at most: the expert and its weight."""


def step_bytes(config: ModelConfig, plan: MemoryPlan, size: StepSize, platform: str) -> int:
    """Bytes that the engine's largest steps take beside their arguments, on a device of this platform.

    `plan` says what the slab and the KV cache are. For a device that this machine has, the steps are those of the
    engine, or `extrapolated` from them. For a GPU that it has not, see `one_layer_bytes`.
    """
    if jax.default_backend() == "cpu":
        plan = in_float32(plan)
        if platform != "cpu":
            return one_layer_bytes(config, plan, size)
    if len(config.moe_layers) <= WHOLE_LAYERS:
        return _bytes(config, plan, size, Executables(), platform)
    return extrapolated(config, plan, size, platform)


def extrapolated(config: ModelConfig, plan: MemoryPlan, size: StepSize, platform: str) -> int:
    """Two models are compiled, with the first MoE layer and with the first two. Every further layer adds what the
    second one added: XLA:CPU runs side by side what it can, so that each layer has temporaries of its own.
    """
    # The sampler is the same for both, so executables are kept. The larger model comes last, and needs more.
    executables = Executables()
    first, second = (_bytes(shortened(config, layers), plan, size, executables, platform) for layers in (1, 2))
    return first + (len(config.moe_layers) - 1) * (second - first)


def one_layer_bytes(config: ModelConfig, plan: MemoryPlan, size: StepSize) -> int:
    """The model up to its first MoE layer is compiled, with the shapes of a GPU and the operations of this CPU. The
    others add what they return: on a GPU the temporaries of a layer are free when the next one begins.

    Compiled to run in turn (`--xla_cpu_enable_concurrency_optimized_scheduler=false`), three layers of Mixtral-8x7B
    take 2 % more than this figure and of Qwen3-30B-A3B 5 % more, less than the margin of `step_workspace`. Activations
    are in float32, so that the figure is rather too large for a model in half precision.
    """
    one = _bytes(shortened(config, 1), plan, size, Executables(), "cuda")
    choices = buckets_of(plan, *size, "cuda").shapes[-1].rows * config.top_k
    return one + 2 * RETURNED_BYTES * choices * (len(config.moe_layers) - 1)


def shortened(config: ModelConfig, moe_layers: int) -> ModelConfig:
    """The same model up to one of its MoE layers."""
    kept = config.moe_layers[:moe_layers]
    layers = kept[-1] + 1
    return config.replace(num_layers=layers, moe_layers=kept, sliding_windows=config.sliding_windows[:layers])


def in_float32(plan: MemoryPlan) -> MemoryPlan:
    """The plan's shapes in float32; experts that are quantised stay so."""
    plain = plan.expert_format == plan.dtype
    return dataclasses.replace(plan, dtype="float32", expert_format="float32" if plain else plan.expert_format)


def abstract_model(config: ModelConfig, dtype: str) -> Decoder:
    """A decoder whose weights are shapes in this dtype."""
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    nnx.update(model, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), nnx.state(model)))
    return model


def _bytes(config: ModelConfig, plan: MemoryPlan, size: StepSize, executables: Executables, platform: str) -> int:
    short = dataclasses.replace(plan, capacities=plan.capacities[: len(config.moe_layers)])
    model = abstract_model(config, plan.dtype)
    return step_workspace(model, short, buckets_of(plan, *size, platform), executables)
