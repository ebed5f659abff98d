"""Routing contracts: which of a token's wishes may be given up where their experts are absent."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal, get_args

from emoe_jax.errors import ConfigError
from emoe_jax.option_fields import Bounds

RoutingContract = Literal["resident", "bounded", "exact"]

CONTRACTS: tuple[RoutingContract, ...] = get_args(RoutingContract)

TOLERANCE = Bounds(0, 1)
"""What a tolerance may be, in a request and of an engine."""

USUAL_TOLERANCE = 0.6
"""As a multiple of the share that each wish has where all weigh the same."""


@dataclasses.dataclass(frozen=True)
class Allowance:
    """Which absent experts a token may do without; any other is loaded before its layer goes on.

    The share of a wish is its router weight over that of all the wishes that the token has in the layer. So it means
    the same for every family, whether it renormalises weights or not.
    """

    tolerance: float = 0.0
    """Wishes of a smaller share may be left out. Without a bound, others stand in for them (eMoE)."""
    budget: float = math.inf
    """What the shares that one token gives up may add up to, over all its layers."""
    sacred: int = 0
    """So many of the first choices of a layer are never left out."""


NOTHING = Allowance()
"""`exact`: every token gets the experts it wishes for."""

EVERYTHING = Allowance(tolerance=math.inf)
"""`resident`: routers choose among resident experts, and nothing is waited for."""


def allowance_of(contract: RoutingContract, bounded: Allowance) -> Allowance:
    """What a token may give up under a contract; `bounded` is for the contract of that name."""
    return {"resident": EVERYTHING, "bounded": bounded, "exact": NOTHING}[contract]


@dataclasses.dataclass(frozen=True)
class QualityTargets:
    """What answers may lose: the expected perplexity over that under all experts, less 1."""

    usual: float
    of_tasks: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @classmethod
    def parse(cls, text: str, name: str = "quality_target") -> "QualityTargets":
        """From "1%", or with targets of some tasks "1%,sum=3%". Raises `ConfigError`."""
        usual: float | None = None
        of_tasks: dict[str, float] = {}
        for part in text.split(","):
            task, given, share = part.rpartition("=")
            target = _share(share.strip())
            if target is None or (given and not task.strip()) or (not given and usual is not None):
                raise ConfigError(f"{name} is {text!r}; expected a percentage such as '1%', or '1%,TASK=3%'")
            if given:
                of_tasks[task.strip()] = target
            else:
                usual = target
        if usual is None:
            raise ConfigError(
                f"{name} is {text!r}, which has targets of tasks only; put the others' first: '1%,TASK=3%'"
            )
        return cls(usual, of_tasks)


def _share(text: str) -> float | None:
    """The number that a percentage above 0 means."""
    try:
        percent = float(text.removesuffix("%"))
    except ValueError:
        return None
    return percent / 100 if text.endswith("%") and 0 < percent < math.inf else None
