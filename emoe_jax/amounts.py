"""Amounts of memory as users write them: a share, bytes, or slots."""

import dataclasses
import re
from fractions import Fraction
from typing import Literal

from emoe_jax.errors import ConfigError

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
    has_unit: bool = True

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
            raise ConfigError(f"{name} {text!r} is more than all experts; at most 100%")
        return ExpertBudget("share", number / 100)
    if unit in ("SLOT", "SLOTS"):
        if number.denominator != 1:
            raise ConfigError(f"{name} {text!r} is not a whole number of slots")
        return ExpertBudget("slots", number, has_unit=match[2] is not None)
    return ExpertBudget("bytes", number * _UNITS[unit])


def parse_bytes(name: str, amount: str | int) -> int:
    """An integer of bytes, or text such as `2GiB`; nothing needs no unit. Raises `ConfigError` with the name."""
    if amount == "0":
        return 0
    if isinstance(amount, int):
        if amount < 0:
            raise ConfigError(f"{name} is {amount}; expected a positive number of bytes")
        return amount
    try:
        budget = parse_expert_memory(amount, name)
    except ConfigError:
        budget = None
    if budget is None or budget.kind != "bytes":
        raise ConfigError(f"{name} {amount!r} is not an amount of bytes; expected for example 2GiB")
    return int(budget.amount)


def parse_bandwidth(amount: str | float | None, name: str = "link_bandwidth") -> float | None:
    """Bytes per second: a number, or text such as `2GiB`; None is no limit. Raises `ConfigError`."""
    if amount is None:
        return None
    bandwidth = float(parse_bytes(name, amount) if isinstance(amount, str) else amount)
    if not bandwidth > 0:
        raise ConfigError(f"{name} is {amount!r}; expected more than 0 bytes per second")
    return bandwidth


def format_bytes(count: int) -> str:
    """`1536` -> `1.5 KiB`."""
    value = float(count)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.4g} {unit}"
        value /= 1024
    return f"{value:.4g} TiB"


def format_number(value: float, digits: int = 4) -> str:
    """A number as every table writes it: `1234.56` -> `1,235`, `12345` -> `12,345`, `0.5` -> `0.5`.

    A fraction has so many digits; an integer has all of its own.
    """
    if isinstance(value, int):
        return f"{value:,}"
    rounded = float(f"{value:.{digits}g}")
    return f"{rounded:,.0f}" if abs(rounded) >= 10 ** (digits - 1) else f"{rounded:g}"
