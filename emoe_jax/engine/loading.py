"""From a checkpoint and an `EngineConfig` to the parts of an engine."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
from flax import nnx

from emoe_jax.amounts import parse_bandwidth
from emoe_jax.checkpoint import Checkpoint, Tokenizer
from emoe_jax.config import ModelConfig
from emoe_jax.device.dispatcher import Dispatcher
from emoe_jax.device.executables import Executables
from emoe_jax.device.kv_cache import new_cache
from emoe_jax.device.runner import Runner
from emoe_jax.device.shapes import Buckets
from emoe_jax.engine.defaults import model_name, sampling_defaults
from emoe_jax.engine_config import EngineConfig
from emoe_jax.experts.link import ModelledLink
from emoe_jax.experts.record_format import RecordFormat
from emoe_jax.memory.device_settings import prepare_devices
from emoe_jax.memory.plan import MemoryPlan, machine_memory, usable_memory
from emoe_jax.memory.requested import requested_plan
from emoe_jax.memory.workspace import compile_steps, measured_plan
from emoe_jax.models import load_tokenizer, open_checkpoint
from emoe_jax.models.decoder import Decoder
from emoe_jax.models.loading import load_dense
from emoe_jax.moe.kernel_choice import KernelKey, use_choice
from emoe_jax.platforms import default_platform
from emoe_jax.policies.regret import Regret
from emoe_jax.residency.admission import ExpertLoading
from emoe_jax.residency.knowledge import RoutingKnowledge
from emoe_jax.residency.planner import ResidencyPlanner
from emoe_jax.residency.residency import Residency
from emoe_jax.scheduling.pages import PAGE_SIZE, PagePool
from emoe_jax.scheduling.registry import make_admission_policy
from emoe_jax.scheduling.scheduler import Scheduler
from emoe_jax.tasks import TaskProfile

StageProgress = Callable[[str, int, int], None]
"""Called with `(stage, done, total)`."""


@dataclasses.dataclass(frozen=True)
class EngineParts:
    """What `Engine` is made of. The owner of the parts closes them."""

    options: EngineConfig
    model_name: str
    tokenizer: Tokenizer | None
    sampling_defaults: dict[str, Any]
    memory: MemoryPlan
    profile: TaskProfile | None
    runner: Runner
    dispatcher: Dispatcher
    scheduler: Scheduler
    residency: Residency
    planner: ResidencyPlanner | None
    regret: Regret
    predictor: Path | None
    """Where the predictor that the planner asks is from; None where there is none."""
    kernels: Path | Literal["default"] | None
    """Where the tile sizes of the MoE op's kernels are from; None on devices where it has no kernels."""

    def close(self) -> None:
        """Stop the threads of loader and planner."""
        self.residency.close()
        if self.planner is not None:
            self.planner.close()


def load_parts(path: str | Path, options: EngineConfig, progress: StageProgress | None = None) -> EngineParts:
    """Open a checkpoint directory (or hub id) and make as many of its experts resident as the options ask for.

    Raises `CheckpointError`, `ConfigError` or `CapacityError`; nothing stays allocated then.
    """
    prepare_devices(machine_memory())
    platform = jax.devices()[0].platform
    options, size = options.resolved(platform), options.step_size(platform)
    checkpoint = open_checkpoint(
        path, router_capacity_factor=options.router_capacity_factor, trace_ranks=options.trace_ranks
    )
    config = checkpoint.config
    plan = requested_plan(config, options, platform, usable_memory(options.device_memory), machine_memory())
    first = plan(step_bytes=0)  # refuses what can never fit before seconds go into the predictor
    kernels = used_kernels(config, first.dtype, first.expert_format)
    defaults = sampling_defaults(checkpoint.directory, options.generation_config)
    tokenizer = load_tokenizer(checkpoint.directory, options.chat_template)
    known = RoutingKnowledge.load(checkpoint.directory, config, options.task_profile, options.predictor)
    plan = functools.partial(plan, spread=functools.partial(known.split, config=config))

    def report(stage: str) -> Callable[[int, int], None] | None:
        return None if progress is None else functools.partial(progress, stage)

    def load_model(dtype: str) -> Decoder:
        return nnx.merge(*load_dense(checkpoint, dtype, report("weights")))

    executables = Executables()
    memory, model = measured_plan(plan, load_model, *size, executables)
    prefill_chunk = min(size.tokens, memory.max_model_len)
    scheduler = Scheduler(
        PagePool(memory.num_pages, PAGE_SIZE),
        *size,
        memory.max_model_len,
        prefill_chunk,
        config.eos_token_ids,
        # Where routers drop tokens over capacity, what a token gets depends on the rows it was computed with.
        prefix_caching=options.prefix_caching and config.router.capacity_factor is None,
    )
    model = model or load_model(memory.dtype)
    buckets = Buckets.of(size.sequences, prefill_chunk, memory.max_model_len)
    if compiles_first(platform):
        compile_steps(model, memory, buckets, executables, buckets.shapes, report("compile"))
    residency = _empty_residency(checkpoint, memory, options, known)
    planner = None
    try:
        planner = known.planner(options.policy, config, memory.capacities, options.predict_every)
        loading_seconds = ExpertLoading(known.profile, residency).seconds
        scheduler.use_policy(
            make_admission_policy(options.scheduling_policy, scheduler, known.profile, loading_seconds)
        )
        residency.fill(report("experts"))
        cache = new_cache(config, memory.num_pages, memory.dtype)
        runner = Runner(model, residency, cache, buckets, executables)
        return EngineParts(
            options=options,
            model_name=model_name(path),
            tokenizer=tokenizer,
            sampling_defaults=defaults,
            memory=memory,
            profile=known.profile,
            runner=runner,
            dispatcher=Dispatcher(runner, residency),
            scheduler=scheduler,
            residency=residency,
            planner=planner,
            regret=known.regret(config, memory.capacities),
            kernels=kernels,
            predictor=known.predictor_path if planner is not None and planner.predicts else None,
        )
    except BaseException:
        residency.close()
        if planner is not None:
            planner.close()
        raise


def used_kernels(config: ModelConfig, dtype: str, expert_format: str) -> Path | Literal["default"] | None:
    """Have the MoE op use the tile sizes that were measured on this device, before a step is traced."""
    if default_platform() != "cuda":
        return None
    return use_choice(KernelKey.of(config, dtype, expert_format), jax.devices()[0].device_kind) or "default"


def compiles_first(platform: str) -> bool:
    """Whether steps are compiled before there are a slab and a KV cache: not on a CPU, where the compiler tries nothing
    out, and steps that never run need not be compiled.
    """
    return platform != "cpu"


def _empty_residency(
    checkpoint: Checkpoint, memory: MemoryPlan, options: EngineConfig, known: RoutingKnowledge
) -> Residency:
    """Slab, store and loader of a checkpoint, still empty. Raises `ConfigError` for a policy that cannot be had."""
    config = checkpoint.config
    record_format = RecordFormat.of(config, memory.expert_format)
    return Residency(
        config,
        record_format,
        memory.capacities,
        checkpoint,
        options.policy,
        rates=known.rates(config),
        knowledge=known.for_policies(),
        link_bandwidth=parse_bandwidth(options.link_bandwidth),
        modelled_link=None if options.link_gbps is None else ModelledLink(1e9 * options.link_gbps),
        host_bytes=memory.host_bytes,
        memory_kind=None if jax.devices()[0].platform == "cpu" else "pinned_host",
        seed=options.seed,
    )
