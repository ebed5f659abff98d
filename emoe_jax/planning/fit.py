"""Whether a model has room on a device under the options of an engine, and for what."""

import dataclasses
import math

import jax.numpy as jnp

from emoe_jax.amounts import ExpertBudget, parse_expert_memory
from emoe_jax.config import ModelConfig
from emoe_jax.device.kv_cache import page_bytes
from emoe_jax.engine_config import EngineConfig
from emoe_jax.errors import CapacityError
from emoe_jax.experts.pieces import staging_bytes
from emoe_jax.experts.record_format import RecordFormat
from emoe_jax.memory.budget import capacities
from emoe_jax.memory.plan import WORKSPACE_SHARE, MemoryPlan, dense_parameters, machine_memory, resolve_dtype
from emoe_jax.memory.requested import requested_plan
from emoe_jax.memory.workspace import plan_by_steps
from emoe_jax.planning.compiled import step_bytes
from emoe_jax.planning.targets import Target
from emoe_jax.scheduling.pages import PAGE_SIZE, pages_for

_NO_LIMIT = 2**50


@dataclasses.dataclass(frozen=True)
class Parts:
    """Bytes of a device's memory by purpose: as planned, or where that is too much, as they would have to be."""

    weights: int
    slab: int
    kv: int
    workspace: int

    @property
    def total(self) -> int:
        """All of them together."""
        return self.weights + self.slab + self.kv + self.workspace


@dataclasses.dataclass(frozen=True)
class Fit:
    """What of a model has room on a device."""

    parts: Parts
    slots: int
    """Of all MoE layers together."""
    context: int
    """Tokens that a sequence may have: as asked for, or what the engine would choose."""
    max_context: int
    """Tokens of the longest sequences, as many together as were asked for (or one); at most the model's own limit."""
    max_batch: int
    """Sequences of `context` tokens that have room together."""
    problem: str | None
    """Why it does not fit; None where it does."""

    @property
    def fits(self) -> bool:
        """Whether an engine starts, and has room for all sequences that were asked for at once."""
        return self.problem is None


@dataclasses.dataclass(frozen=True)
class Footprint:
    """What a model under options takes of the memory of devices of one platform."""

    config: ModelConfig
    options: EngineConfig
    """`max_model_len` and `max_num_seqs` are the sequences that are to have room at once."""
    platform: str
    step_bytes: int | None
    """What a step takes beside its arguments; None: as the engine plans without a figure, a share of the device."""

    @classmethod
    def compiled(cls, config: ModelConfig, options: EngineConfig, platform: str) -> "Footprint":
        """With what a step takes, compiled for a device on which everything has room."""
        roomy = requested_plan(config, options, platform, _NO_LIMIT, 0)(step_bytes=0)
        return cls(config, options, platform, step_bytes(config, roomy, options.step_size(platform), platform))

    @property
    def dtype(self) -> str:
        """Of the weights without experts, the KV cache, and what is computed."""
        return resolve_dtype(self.options.dtype, self.config, self.platform)

    @property
    def expert_format(self) -> str:
        """The name of the record format of experts."""
        stored = self.config.expert_format or self.dtype
        return stored if self.options.expert_format == "auto" else self.options.expert_format

    @property
    def record_bytes(self) -> int:
        """Of one expert."""
        return RecordFormat.of(self.config, self.expert_format).nbytes

    @property
    def batch(self) -> int:
        """Sequences that are to have room at once: as asked for, or one."""
        sequences = self.options.max_num_seqs
        return sequences if isinstance(sequences, int) else 1

    def with_options(self, options: EngineConfig) -> "Footprint":
        """The same model under other options; a step takes the same, whatever is resident and in which format."""
        return dataclasses.replace(self, options=options)

    def fit(self, target: Target) -> Fit:
        """On a device. Raises `ConfigError` where options do not suit the model."""
        plan = requested_plan(self.config, self.options, self.platform, target.memory_bytes, 0)
        try:
            return self.fit_of(plan() if self.step_bytes is None else plan(step_bytes=self.step_bytes))
        except CapacityError as error:
            return self._unfit(target, str(error))

    def fit_here(self, target: Target) -> Fit:
        """On this machine's own device: what `Engine.load` would plan, by the same code and the same compiled steps."""
        config, platform, size = self.config, self.platform, self.options.step_size(self.platform)
        plan = requested_plan(config, self.options, platform, target.memory_bytes, machine_memory())
        try:
            return self.fit_of(plan_by_steps(plan, lambda first: step_bytes(config, first, size, platform)))
        except CapacityError as error:
            return self._unfit(target, str(error))

    def fit_of(self, plan: MemoryPlan) -> Fit:
        """From an engine's memory plan."""
        parts = Parts(plan.dense_bytes, plan.slab_bytes, plan.kv_bytes, plan.workspace_bytes)
        context = self.options.length_limit or plan.max_model_len
        longest, most = self._room(plan.device_bytes, parts, context)
        problem = None
        if plan.num_pages - 1 < self.batch * pages_for(context):
            problem = (
                f"the KV cache has room for {most:,} sequences of {context:,} tokens at once, not for {self.batch:,}"
            )
        return Fit(parts, sum(plan.capacities), context, longest, most, problem)

    def largest_share(self, target: Target) -> float | None:
        """The most of its experts in percent, to a tenth, that leave room for the sequences; None where top-k do not.

        A context that was not asked for is the model's own limit.
        """
        count = len(self.config.moe_layers) * self.config.num_experts
        left = target.memory_bytes - self._needed(0, target).total
        slots = min(count, max(0, left) // self.record_bytes)
        if slots < self.config.top_k * len(self.config.moe_layers):
            return None
        return int(1000 * slots / count) / 10

    def _unfit(self, target: Target, problem: str) -> Fit:
        budget = parse_expert_memory(str(self.options.expert_memory)) if self.options.expert_memory != "auto" else None
        slots = self._slots(budget)
        parts = self._needed(slots, target)
        context = self.options.length_limit or self.config.max_position
        longest, most = self._room(target.memory_bytes, parts, context)
        return Fit(parts, slots, context, longest, most, problem)

    def _slots(self, budget: ExpertBudget | None) -> int:
        """What a budget buys, but at least top-k; where as many as fit were asked for, top-k."""
        least = self.config.top_k * len(self.config.moe_layers)
        if budget is None:
            return least
        try:
            return sum(capacities(self.config, RecordFormat.of(self.config, self.expert_format), budget))
        except CapacityError:
            return least

    def _needed(self, slots: int, target: Target) -> Parts:
        """What so many slots and the sequences take."""
        context = self.options.length_limit or self.config.max_position
        workspace = math.ceil(target.memory_bytes * WORKSPACE_SHARE)
        if self.step_bytes is not None:
            workspace = staging_bytes(self.record_bytes) + self.step_bytes
        return Parts(
            weights=dense_parameters(self.config) * jnp.dtype(self.dtype).itemsize,
            slab=slots * self.record_bytes,
            kv=(self.batch * pages_for(context) + 1) * page_bytes(self.config, self.dtype),
            workspace=workspace,
        )

    def _room(self, device_bytes: int, parts: Parts, context: int) -> tuple[int, int]:
        """`max_context` and `max_batch` of a `Fit`, with all that is left of the device as the KV cache."""
        left = device_bytes - parts.weights - parts.slab - parts.workspace
        pages = max(0, left // page_bytes(self.config, self.dtype) - 1)
        return min(self.config.max_position, pages // self.batch * PAGE_SIZE), pages // pages_for(context)
