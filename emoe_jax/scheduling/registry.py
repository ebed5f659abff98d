"""Admission policies by name."""

import math
from typing import Protocol

from emoe_jax.errors import ConfigError
from emoe_jax.scheduling.cost import CostModel
from emoe_jax.scheduling.estimates import Estimates
from emoe_jax.scheduling.lengths import OutputLengths
from emoe_jax.scheduling.policy import AdmissionPolicy, FcfsPolicy
from emoe_jax.scheduling.slo import MAX_WAIT, LoadingSeconds, SloPolicy, loads_nothing
from emoe_jax.tasks.profile import TaskProfile

SCHEDULING_POLICIES = ("slo", "fcfs")
PARTS = ("c", "G", "dE", "aging", "guard")
"""What `slo` goes by: see `docs/explanation/scheduling.md`."""
_WITHOUT = "slo-without-"


def without(part: str) -> str:
    """The name of `slo` less one of `PARTS`."""
    return _WITHOUT + part


VARIANTS = tuple(map(without, PARTS))
"""`slo` less one of its parts, to measure what the part is worth."""


def check_policy(name: str) -> None:
    """Raise `ConfigError` when there is no policy of that name."""
    if name not in SCHEDULING_POLICIES + VARIANTS:
        raise ConfigError(f"scheduling policy is {name!r}; expected one of {', '.join(SCHEDULING_POLICIES)}")


class Limits(Protocol):
    """Limits of what runs at the same time. The scheduler has them."""

    @property
    def max_num_seqs(self) -> int:
        """The most sequences that run at the same time."""
        ...

    @property
    def max_model_len(self) -> int:
        """The most tokens of prompt and answer together."""
        ...

    @property
    def prefill_chunk(self) -> int:
        """The most prompt tokens of one sequence in one step."""
        ...


def make_admission_policy(
    name: str, limits: Limits, profile: TaskProfile | None = None, loading_seconds: LoadingSeconds = loads_nothing
) -> AdmissionPolicy:
    """One of `SCHEDULING_POLICIES` or `VARIANTS`, for a scheduler of these limits.

    Raises `ConfigError` for another name.
    """
    check_policy(name)
    if name == "fcfs":
        return FcfsPolicy()
    part = name.removeprefix(_WITHOUT)
    lengths, cost = OutputLengths(profile, by_task=part != "G"), CostModel()
    sizes = limits.max_num_seqs, limits.max_model_len, limits.prefill_chunk
    return SloPolicy(
        Estimates(lengths, cost, *sizes, learns=part != "c"),
        name=name,
        guarded=part != "guard",
        max_wait=math.inf if part == "aging" else MAX_WAIT,
        loading_seconds=loads_nothing if part == "dE" else loading_seconds,
    )
