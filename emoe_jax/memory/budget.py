"""How many expert slots a memory budget buys."""

import math
from fractions import Fraction
from typing import Literal

from emoe_jax.amounts import ExpertBudget, format_bytes
from emoe_jax.config import ModelConfig
from emoe_jax.errors import CapacityError, ConfigError
from emoe_jax.experts.record_format import RecordFormat


def capacities(
    config: ModelConfig, record_format: RecordFormat, budget: ExpertBudget, device_limit: int | None = None
) -> list[int]:
    """Slots of each MoE layer: as many as the budget buys in all, and where they do not come out even, one more in the
    first layers; at most all experts.

    `device_limit` is the device memory in bytes that the slab may take. Raises `CapacityError` when the budget does not
    reach top-k slots per layer, or exceeds the device, `ConfigError` when it names more slots than a layer has experts.
    """
    num_layers, num_experts = len(config.moe_layers), config.num_experts
    if device_limit is not None and budget.kind == "bytes" and budget.amount > device_limit:
        raise CapacityError(
            f"expert memory of {budget} is more than the {format_bytes(device_limit)} the device has for experts"
        )
    if budget.kind == "share":
        slots = math.floor(budget.amount * num_experts * num_layers)
    elif budget.kind == "bytes":
        slots = math.floor(budget.amount / record_format.nbytes)
    else:
        slots = int(budget.amount) * num_layers
        if budget.amount > num_experts:
            n = int(budget.amount)
            hint = (
                "" if budget.has_unit else f"; a number without a unit is slots: say {n}% or {n}MB for a share or bytes"
            )
            raise ConfigError(f"expert memory of {budget} is more than all experts; a layer has {num_experts}{hint}")
    if slots < config.top_k * num_layers:
        raise CapacityError(
            f"expert memory of {budget} gives {_per_layer(slots, num_layers)}, but the model routes each token to "
            f"{config.top_k}; the smallest budget is {_smallest(config, record_format, budget.kind)}"
        )
    slots = min(slots, num_experts * num_layers)
    needed = slots * record_format.nbytes
    if device_limit is not None and needed > device_limit:
        raise CapacityError(
            f"expert memory of {budget} is {format_bytes(needed)} ({_per_layer(slots, num_layers)}), "
            f"more than the {format_bytes(device_limit)} the device has for experts"
        )
    each, more = divmod(slots, num_layers)
    return [each + (layer < more) for layer in range(num_layers)]


def _per_layer(slots: int, num_layers: int) -> str:
    each, more = divmod(slots, num_layers)
    return f"{each}{f' or {each + 1}' if more else ''} expert slots in each of {num_layers} layers"


def _smallest(config: ModelConfig, record_format: RecordFormat, kind: Literal["share", "bytes", "slots"]) -> str:
    """The least budget that reaches top-k slots, rounded up and written so that it parses."""
    if kind == "share":
        return f"{math.ceil(Fraction(1000 * config.top_k, config.num_experts)) / 10:g}%"
    if kind == "slots":
        return f"{config.top_k} slots"
    count = config.top_k * record_format.nbytes * len(config.moe_layers)
    unit, size = ("GiB", 2**30) if count >= 2**30 else ("MiB", 2**20) if count >= 2**20 else ("KiB", 2**10)
    return f"{math.ceil(Fraction(100 * count, size)) / 100:g}{unit}"
