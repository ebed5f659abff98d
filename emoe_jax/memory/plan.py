"""One plan of the device's memory: dense weights, expert slab, KV cache, and workspace."""

import dataclasses
import functools
import math
import os
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
from flax import nnx

from emoe_jax.amounts import ExpertBudget, format_bytes, parse_bytes, parse_expert_memory
from emoe_jax.config import ModelConfig
from emoe_jax.device.kv_cache import page_bytes
from emoe_jax.engine_config import Dtype
from emoe_jax.errors import CapacityError, ConfigError
from emoe_jax.experts.pieces import staging_bytes
from emoe_jax.experts.record_format import RecordFormat
from emoe_jax.memory.budget import capacities
from emoe_jax.memory.splits import MemorySplit, Sizes, trade_bytes, trading
from emoe_jax.models.decoder import Decoder
from emoe_jax.scheduling.pages import PAGE_SIZE, pages_for

WORKSPACE_SHARE = 0.1
"""Share of the device that is workspace where the need of a step was not measured."""

KV_SHARE = 0.1
"""Share of what the weights without experts leave of the device that is the KV cache's before experts are chosen."""

CPU_SHARE = 0.75
"""Share of a machine's memory that weights and experts take at most, where the device is the CPU and no option says
how much: other programs, and this one, need some."""

Spread = Callable[[tuple[int, ...]], tuple[int, ...]]
"""The same number of slots, distributed otherwise over the layers."""

HOST_SHARE = 0.5
"""Share of what is left of the machine's memory that experts off the device may take where no option says how much."""

DTYPES = get_args(Dtype)


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Bytes by purpose, slots per MoE layer and KV pages (the trash page included).

    Workspace is what a step takes beside its arguments, experts on their way to the slab and, while slab and KV cache
    trade places (`lean`), the new arrays of one layer; no step runs meanwhile.
    """

    dtype: str
    """Of the weights without experts, and of what is computed."""
    expert_format: str
    """The name of the `RecordFormat` of experts."""
    device_bytes: int
    dense_bytes: int
    slab_bytes: int
    kv_bytes: int
    workspace_bytes: int
    host_bytes: int
    capacities: tuple[int, ...]
    num_pages: int
    max_model_len: int
    is_bound: bool
    """Whether the device's memory, and nothing else, is why the KV cache is not larger."""
    sizes: Sizes
    lean: MemorySplit | None
    """What slab and KV cache may become under load; None where they keep what they have."""

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        *,
        platform: str,
        device_bytes: int,
        dtype: str = "auto",
        expert_format: str = "auto",
        expert_memory: str | int = "auto",
        host_memory: str | int = "auto",
        machine_bytes: int = 0,
        kv_memory: str | int | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int = 16,
        step_bytes: int | None = None,
        spread: Spread | None = None,
        may_trade: bool = False,
    ) -> "MemoryPlan":
        """Split `device_bytes`. The KV cache gets `kv_memory`, or room for `max_num_seqs` full sequences if that fits.

        `expert_format="auto"` is what the checkpoint stores experts in. Amounts of expert memory buy records of the
        format.

        `expert_memory="auto"` is all experts, where they fit beside `KV_SHARE` of what the weights without experts
        leave, or beside the KV cache that is wanted if that is less. Where they do not fit, it is as many as do. Where
        the model needs more than that for its top-k experts of each layer, the KV cache gives way, down to one
        sequence. On a CPU the experts also leave the rest of `CPU_SHARE` of `machine_bytes` to other programs.

        `step_bytes` is what a step takes beside its arguments (`step_workspace`); without it, a share of the device is
        workspace. `max_model_len` defaults to the model's limit, or to what the KV cache can hold of one sequence.
        `spread` distributes slots over layers, unless the budget names slots per layer. With `may_trade`, slots can
        become pages where the KV cache has not all it wants. `host_memory="auto"` has room for all experts in
        `HOST_SHARE` of the machine's memory at most, less what a plan for a CPU takes of it, and for none where all are
        on the device. Raises `CapacityError` with both numbers when something
        does not fit, `ConfigError` for a malformed amount.
        """
        dtype = resolve_dtype(dtype, config, platform)
        if expert_format == "auto":
            expert_format = config.expert_format or dtype
        record_format = RecordFormat.of(config, expert_format)
        page = page_bytes(config, dtype)
        sizes = Sizes(record_format.nbytes, page // config.num_layers, config.num_layers)
        if step_bytes is None:
            staging, step_bytes = 0, math.ceil(device_bytes * WORKSPACE_SHARE)
        else:
            staging = staging_bytes(record_format.nbytes)
        usable = device_bytes - staging - step_bytes
        dense = dense_parameters(config) * jnp.dtype(dtype).itemsize
        if dense > usable:
            raise CapacityError(
                f"the model's weights without experts take {format_bytes(dense)}; "
                f"{format_bytes(max(usable, 0))} of the device's {format_bytes(device_bytes)} can be used"
            )
        if max_model_len is not None and not 2 <= max_model_len <= config.max_position:
            raise ConfigError(f"max_model_len is {max_model_len}; the model allows 2 to {config.max_position}")
        wanted = max_num_seqs * pages_for(max_model_len or config.max_position)
        needed = pages_for(max_model_len or 2)
        if expert_memory == "auto":
            least, most_wanted = page * (needed + 1), page * (wanted + 1)
            if kv_memory is not None:
                least = most_wanted = parse_bytes("kv_memory", kv_memory)
            most = int(machine_bytes * CPU_SHARE) - dense if platform == "cpu" and machine_bytes else usable
            expert_budget = _fitting(config, record_format, usable - dense, (least, most_wanted), most)
        else:
            expert_budget = parse_expert_memory(str(expert_memory))
        slots = tuple(capacities(config, record_format, expert_budget, usable - dense))
        if spread is not None and expert_budget.kind != "slots":
            slots = spread(slots)
        slab = sum(slots) * record_format.nbytes
        left = usable - dense - slab
        budget = left if kv_memory is None else parse_bytes("kv_memory", kv_memory)
        if budget > left:
            raise CapacityError(
                f"kv_memory of {format_bytes(budget)} is more than the {format_bytes(left)} that weights and expert "
                "slab leave"
            )
        pages = min(wanted, budget // page - 1)
        if pages < needed:
            raise CapacityError(
                f"the KV cache can have {format_bytes(max(budget, 0))}; one sequence of {max_model_len or 2:,} tokens "
                f"needs {format_bytes((needed + 1) * page)}"
            )
        is_bound = kv_memory is None and pages < wanted
        longest = max_model_len or min(config.max_position, pages * PAGE_SIZE)
        planned, lean = MemorySplit(slots, pages + 1), None
        if may_trade:
            needed, wanted = pages_for(longest), max_num_seqs * pages_for(longest)
            room = device_bytes - dense - staging
            planned, lean, step_bytes = trading(planned, sizes, wanted + 1, needed + 1, config.top_k, room, step_bytes)
        if host_memory != "auto":
            host = parse_bytes("host_memory", host_memory)
        elif lean is None and min(slots) == config.num_experts:
            host = 0
        else:
            taken = dense + slab + planned.num_pages * page + staging + step_bytes if platform == "cpu" else 0
            host = int(max(0, machine_bytes - taken) * HOST_SHARE)
            host = min(host, len(slots) * config.num_experts * record_format.nbytes)
        return cls(
            dtype=dtype,
            expert_format=expert_format,
            device_bytes=device_bytes,
            dense_bytes=dense,
            slab_bytes=slab,
            kv_bytes=planned.num_pages * page,
            workspace_bytes=staging + step_bytes,
            host_bytes=host,
            capacities=slots,
            num_pages=planned.num_pages,
            max_model_len=longest,
            is_bound=is_bound,
            sizes=sizes,
            lean=lean,
        )

    @property
    def planned(self) -> MemorySplit:
        """What slab and KV cache start with."""
        return MemorySplit(self.capacities, self.num_pages)

    @property
    def is_tight(self) -> bool:
        """Whether what a step takes matters: the KV cache could be larger, or little of the device is left."""
        left = self.device_bytes - self.dense_bytes - self.slab_bytes - self.kv_bytes
        share = WORKSPACE_SHARE * self.device_bytes
        return self.is_bound or left <= share + 1 or share < staging_bytes(self.sizes.slot) * 2

    def measured(self, step_bytes: int) -> "MemoryPlan":
        """The plan with what steps do take as workspace. Raises `CapacityError` when that is not left of the device."""
        step_bytes = max(step_bytes, self.trade_bytes)
        workspace = staging_bytes(self.sizes.slot) + step_bytes
        left = self.device_bytes - self.dense_bytes - self.sizes.of(self.planned)
        if workspace > left:
            raise CapacityError(
                f"weights, expert slab and KV cache leave {format_bytes(left)} of the device's "
                f"{format_bytes(self.device_bytes)}; steps and loading experts need {format_bytes(workspace)}"
            )
        return dataclasses.replace(self, workspace_bytes=workspace)

    @property
    def trade_bytes(self) -> int:
        """What a trade of slab and KV cache takes for a moment beyond the two."""
        if self.lean is None:
            return 0
        return trade_bytes(self.planned, self.lean, self.sizes)

    def report(self, split: MemorySplit | None = None) -> dict[str, int]:
        """Bytes by purpose, as planned or when slab and KV cache have traded places."""
        split = split or self.planned
        return {
            "device": self.device_bytes,
            "weights": self.dense_bytes,
            "slab": sum(split.capacities) * self.sizes.slot,
            "kv_cache": split.num_pages * self.sizes.page,
            "workspace": self.workspace_bytes,
            "host": self.host_bytes,
        }


def _fitting(
    config: ModelConfig, record_format: RecordFormat, room: int, cache: tuple[int, int], most: int
) -> ExpertBudget:
    """Bytes for as many experts as fit into `room` beside the KV cache, and into `most`.

    `cache` is the least that the KV cache needs and the most that it wants. Raises `CapacityError` where that least
    and top-k experts of each layer are more than `room`.
    """
    smallest = config.top_k * len(config.moe_layers) * record_format.nbytes
    least, wanted = cache
    if smallest + least > room:
        raise CapacityError(
            f"the device has {format_bytes(room)} for experts and KV cache; {config.top_k} experts of each layer need "
            f"{format_bytes(smallest)}, and the KV cache needs {format_bytes(least)}"
        )
    reserve = min(wanted, max(least, math.ceil(room * KV_SHARE)))
    fits = min(room - reserve, most)
    return ExpertBudget("bytes", Fraction(max(fits, smallest)))


def resolve_dtype(dtype: str, config: ModelConfig, platform: str) -> str:
    """`auto` is the checkpoint's dtype; on CPU float32, because half-precision products are 50 times slower there."""
    if dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
    if dtype != "auto":
        return dtype
    if platform == "cpu" or config.dtype not in DTYPES:
        return "float32"
    return config.dtype


def usable_memory(amount: str | int | None = None) -> int:
    """Bytes of the default device to plan with: an amount, else what is free of it.

    On CPU, the memory of the machine or of the container that this process runs in. Raises `CapacityError` for more
    than a device has, `ConfigError` for a malformed amount.
    """
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        most, free = int(stats["bytes_limit"]), int(stats["bytes_limit"]) - int(stats.get("bytes_in_use", 0))
    else:
        most = free = machine_memory()
    if amount is None:
        return free
    asked = parse_bytes("device_memory", amount)
    if asked > most:
        raise CapacityError(f"device_memory of {format_bytes(asked)} is more than the device's {format_bytes(most)}")
    return asked


def machine_memory() -> int:
    """Bytes of memory of the machine, or of the container that this process runs in."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return machine
    return min(machine, int(limit)) if limit.isdigit() else machine


@functools.cache
def dense_parameters(config: ModelConfig) -> int:
    """Numbers in all weights but the experts'."""
    state = nnx.state(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state))
