"""What a step will take of the device, known from compiling it before there are experts and a KV cache."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from emoe_jax.device import step
from emoe_jax.device.batch import Buckets, Shape, empty_batch
from emoe_jax.device.compiling import MemoryShapes, compile_adjusted_choice
from emoe_jax.device.executables import Executables
from emoe_jax.device.kv_cache import new_cache
from emoe_jax.experts.weights import ExpertLayout
from emoe_jax.memory.plan import MemoryPlan
from emoe_jax.models.decoder import Decoder

MARGIN = 1.1
"""Of what the largest steps take: other shapes may take a little more."""


def measured_plan(
    plan: Callable[..., MemoryPlan],
    load_dense: Callable[[str], Decoder],
    max_num_seqs: int,
    max_num_batched_tokens: int,
    executables: Executables,
) -> tuple[MemoryPlan, Decoder | None]:
    """`plan(step_bytes=...)` with what a step takes, where that matters; then with the model that had to be loaded.

    Where it does not, because all that is wanted fits with much to spare, nothing is compiled now.
    """
    first = plan(step_bytes=0)
    if not first.is_tight:
        return plan(), None
    model = load_dense(first.dtype)
    buckets = Buckets.of(max_num_seqs, min(max_num_batched_tokens, first.max_model_len), first.max_model_len)
    return plan(step_bytes=step_workspace(model, first, buckets, executables)), model


def step_workspace(model: Decoder, plan: MemoryPlan, buckets: Buckets, executables: Executables) -> int:
    """Bytes that a step takes beside its arguments, with a slab and a KV cache as planned.

    Compiles the longest prompt chunk and the largest batch of decodes, and the sampler; they stay in `executables`.
    """
    config, dtype = model.config, plan.dtype
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def on_device(array: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

    layout = ExpertLayout.of(config, dtype)
    skeleton, leaves = step.Skeleton.split(model)
    table = jax.ShapeDtypeStruct((len(config.moe_layers), config.num_experts), np.int32)
    experts = tuple(jax.eval_shape(lambda c=capacity: layout.empty_weights(c)) for capacity in plan.capacities)
    cache = jax.eval_shape(lambda: new_cache(config, plan.num_pages, dtype))
    last_tokens = jax.ShapeDtypeStruct(buckets.sequences[-1:], np.int32)
    leaves, experts, table, cache, last_tokens = jax.tree.map(on_device, (leaves, experts, table, cache, last_tokens))
    shapes = MemoryShapes(plan.capacities, (plan.num_pages,) * config.num_layers)

    def compile_step(shape: Shape) -> None:
        inputs = empty_batch(shape, "resident").inputs
        arguments = (leaves, experts, table, cache, inputs, last_tokens)
        executables.compile(step.resident_step, (shape, shapes), *arguments, skeleton=skeleton, config=config)

    largest = {buckets.fit(buckets.sequences[-1], 1), buckets.fit(1, buckets.chunk_tokens[-1])}
    with ThreadPoolExecutor() as pool:
        for compiled in [pool.submit(compile_step, shape) for shape in sorted(largest)]:
            compiled.result()
    compile_adjusted_choice(executables, buckets, buckets.sequences[-1], config.vocab_size, sharding)
    return int(executables.workspace_bytes * MARGIN)
