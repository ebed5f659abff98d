"""Admission policies by name."""

from emoe_jax.errors import ConfigError
from emoe_jax.scheduling.cost import CostModel
from emoe_jax.scheduling.estimates import Estimates
from emoe_jax.scheduling.lengths import OutputLengths
from emoe_jax.scheduling.policy import AdmissionPolicy, FcfsPolicy
from emoe_jax.scheduling.slo import Affinity, LoadingSeconds, SloPolicy, loads_nothing, shares_nothing
from emoe_jax.tasks.profile import TaskProfile

POLICIES = ("slo", "fcfs")


def check_policy(name: str) -> None:
    """Raise `ConfigError` when there is no policy of that name."""
    if name not in POLICIES:
        raise ConfigError(f"scheduling policy is {name!r}; expected one of {', '.join(POLICIES)}")


def make_admission_policy(
    name: str,
    *,
    max_num_seqs: int,
    max_model_len: int,
    prefill_chunk: int,
    profile: TaskProfile | None = None,
    loading_seconds: LoadingSeconds = loads_nothing,
    affinity: Affinity = shares_nothing,
) -> AdmissionPolicy:
    """`slo` or `fcfs`. Raises `ConfigError` for another name."""
    check_policy(name)
    if name == "fcfs":
        return FcfsPolicy()
    return SloPolicy(
        Estimates(OutputLengths(profile), CostModel(), max_num_seqs, max_model_len, prefill_chunk),
        loading_seconds=loading_seconds,
        affinity=affinity,
    )
