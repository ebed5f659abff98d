"""What a step will take of the device, known from compiling it before there are experts and a KV cache."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from emoe_jax.device import step
from emoe_jax.device.compiling import MemoryShapes, bytes_beside, compile_choices
from emoe_jax.device.executables import Executables
from emoe_jax.device.inputs import StepInputs
from emoe_jax.device.kv_cache import new_cache
from emoe_jax.device.shapes import Buckets, Shape
from emoe_jax.experts.record_format import RecordFormat
from emoe_jax.memory.plan import MemoryPlan
from emoe_jax.models.decoder import Decoder
from emoe_jax.progress import Progress

MARGIN = 1.1
"""Of what the largest steps take: other shapes may take a little more."""


def plan_by_steps(plan: Callable[..., MemoryPlan], step_bytes: Callable[[MemoryPlan], int]) -> MemoryPlan:
    """`plan(step_bytes=...)` with what a step takes, where that matters. `step_bytes` compiles it for a plan without.

    Where it does not, because all that is wanted fits with much to spare, nothing is compiled.
    """
    first = plan(step_bytes=0)
    return plan(step_bytes=step_bytes(first)) if first.is_tight else plan()


def measured_plan(
    plan: Callable[..., MemoryPlan],
    load_dense: Callable[[str], Decoder],
    max_num_seqs: int,
    max_num_batched_tokens: int,
    executables: Executables,
) -> tuple[MemoryPlan, Decoder | None]:
    """`plan_by_steps`, and the model where it had to be loaded for that."""
    loaded: list[Decoder] = []

    def step_bytes(first: MemoryPlan) -> int:
        loaded.append(load_dense(first.dtype))
        buckets = buckets_of(first, max_num_seqs, max_num_batched_tokens)
        return step_workspace(loaded[0], first, buckets, executables)

    return plan_by_steps(plan, step_bytes), next(iter(loaded), None)


def buckets_of(
    plan: MemoryPlan, max_num_seqs: int, max_num_batched_tokens: int, platform: str | None = None
) -> Buckets:
    """The shapes of an engine with this plan. `platform` is that of JAX's default device, unless given."""
    return Buckets.of(max_num_seqs, min(max_num_batched_tokens, plan.max_model_len), plan.max_model_len, platform)


def step_workspace(model: Decoder, plan: MemoryPlan, buckets: Buckets, executables: Executables) -> int:
    """Bytes that a step takes beside weights, slab and KV cache, with a slab and a KV cache as planned.

    Compiles the largest batches with and without prompts, and the sampler; they stay in `executables`.
    """
    without, *_, largest = buckets.shapes[len(buckets.sequences) - 1 :]
    compile_steps(model, plan, buckets, executables, (without, largest))
    return int(executables.workspace_bytes * MARGIN) + bytes_beside(buckets, model.config.vocab_size)


def compile_steps(
    model: Decoder,
    plan: MemoryPlan,
    buckets: Buckets,
    executables: Executables,
    shapes: Sequence[Shape],
    progress: Progress | None = None,
) -> None:
    """Compile steps of these shapes, and the sampler, for a slab and a KV cache that do not exist yet.

    A GPU's compiler tries kernels out on the device. That takes memory, which slab and KV cache have once they exist.
    """
    config, dtype = model.config, plan.dtype
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def on_device(array: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

    record_format = RecordFormat.of(config, plan.expert_format)
    skeleton, leaves = step.Skeleton.split(model)
    table = jax.ShapeDtypeStruct((len(config.moe_layers), config.num_experts), np.int32)
    experts = tuple(jax.eval_shape(lambda c=capacity: record_format.empty_weights(c)) for capacity in plan.capacities)
    cache = jax.eval_shape(lambda: new_cache(config, plan.num_pages, dtype))
    last_tokens = jax.ShapeDtypeStruct((buckets.token_places,), np.int32)
    leaves, experts, table, cache, last_tokens = jax.tree.map(on_device, (leaves, experts, table, cache, last_tokens))
    memory = MemoryShapes(plan.capacities, (plan.num_pages,) * config.num_layers)

    def compile_step(shape: Shape) -> None:
        words = on_device(StepInputs.packing(shape).empty())
        arguments = (leaves, experts, table, cache, words, last_tokens)
        statics = {"skeleton": skeleton, "config": config, "shape": shape}
        executables.compile(step.whole_step, (shape, memory), *arguments, **statics)

    with ThreadPoolExecutor() as pool:
        for done, compiled in enumerate([pool.submit(compile_step, shape) for shape in shapes], 1):
            compiled.result()
            if progress is not None:
                progress(done, len(shapes))
    compile_choices(executables, buckets, buckets.sequences[-1], config.vocab_size, sharding)
