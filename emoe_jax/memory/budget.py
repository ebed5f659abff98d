"""How many expert slots a memory budget buys."""

import dataclasses
import math
import re
from fractions import Fraction
from typing import Literal

from emoe_jax.config import ModelConfig
from emoe_jax.errors import CapacityError, ConfigError
from emoe_jax.experts.weights import ExpertLayout

_UNITS = {
    "": 1, "B": 1,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip
_PATTERN = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*(%|slots?|[kmgt]i?b|b)?", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class ExpertBudget:
    """A share of all experts (0 to 1), bytes of device memory, or slots per layer."""

    kind: Literal["share", "bytes", "slots"]
    amount: Fraction

    def __str__(self) -> str:
        if self.kind == "share":
            return f"{float(self.amount * 100):g}%"
        if self.kind == "bytes":
            return format_bytes(int(self.amount))
        return f"{int(self.amount)} slots"


def parse_expert_memory(text: str, name: str = "expert memory") -> ExpertBudget:
    """`"40%"`, `"6GiB"`, `"512MB"`, `"8 slots"` or `"8"` (slots per layer). Raises `ConfigError` for anything else."""
    match = _PATTERN.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"{name} {text!r} is not an amount; expected for example 40%, 6GiB or 8 slots")
    number, unit = Fraction(match[1]), (match[2] or "slots").upper()
    if unit == "%":
        if number > 100:
            raise ConfigError(f"expert memory {text!r} is more than all experts; at most 100%")
        return ExpertBudget("share", number / 100)
    if unit in ("SLOT", "SLOTS"):
        if number.denominator != 1:
            raise ConfigError(f"expert memory {text!r} is not a whole number of slots")
        return ExpertBudget("slots", number)
    return ExpertBudget("bytes", number * _UNITS[unit])


def capacities(
    config: ModelConfig, layout: ExpertLayout, budget: ExpertBudget, device_limit: int | None = None
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
        slots = math.floor(budget.amount / layout.nbytes)
    else:
        slots = int(budget.amount) * num_layers
        if budget.amount > num_experts:
            raise ConfigError(f"expert memory of {budget} is more than all experts; a layer has {num_experts}")
    if slots < config.top_k * num_layers:
        raise CapacityError(
            f"expert memory of {budget} gives {_per_layer(slots, num_layers)}, but the model routes each token to "
            f"{config.top_k}; the smallest budget is {_smallest(config, layout, budget.kind)}"
        )
    slots = min(slots, num_experts * num_layers)
    needed = slots * layout.nbytes
    if device_limit is not None and needed > device_limit:
        raise CapacityError(
            f"expert memory of {budget} is {format_bytes(needed)} ({_per_layer(slots, num_layers)}), "
            f"more than the {format_bytes(device_limit)} the device has for experts"
        )
    each, more = divmod(slots, num_layers)
    return [each + (layer < more) for layer in range(num_layers)]


def format_bytes(count: int) -> str:
    """`1536` -> `1.5 KiB`."""
    value = float(count)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.4g} {unit}"
        value /= 1024
    return f"{value:.4g} TiB"


def _per_layer(slots: int, num_layers: int) -> str:
    each, more = divmod(slots, num_layers)
    return f"{each}{f' or {each + 1}' if more else ''} expert slots in each of {num_layers} layers"


def _smallest(config: ModelConfig, layout: ExpertLayout, kind: Literal["share", "bytes", "slots"]) -> str:
    """The least budget that reaches top-k slots, rounded up and written so that it parses."""
    if kind == "share":
        return f"{math.ceil(Fraction(1000 * config.top_k, config.num_experts)) / 10:g}%"
    if kind == "slots":
        return f"{config.top_k} slots"
    count = config.top_k * layout.nbytes * len(config.moe_layers)
    unit, size = ("GiB", 2**30) if count >= 2**30 else ("MiB", 2**20) if count >= 2**20 else ("KiB", 2**10)
    return f"{math.ceil(Fraction(100 * count, size)) / 100:g}{unit}"
