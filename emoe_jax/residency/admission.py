"""The loading time of a request: what an admission policy knows of the experts."""

from typing import Protocol

from emoe_jax.experts.loader_stats import LoaderStats
from emoe_jax.experts.table import SlotTable
from emoe_jax.policies import POLICIES
from emoe_jax.requests.sequence import Sequence
from emoe_jax.tasks import TaskProfile
from emoe_jax.tasks.experts import TaskExperts


class Residents(Protocol):
    """Which experts are resident, and what loads have cost so far. `Residency` has these."""

    @property
    def policy_name(self) -> str:
        """The name of the residency policy in `POLICIES`."""
        ...

    @property
    def table(self) -> SlotTable:
        """The live table. Read it on the thread that owns the step."""
        ...

    @property
    def loads(self) -> LoaderStats:
        """Totals of the loader since it was made."""
        ...

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert's weights in the slab."""
        ...


class ExpertLoading:
    """`dE` of eMoE eq. 3, from what loads have cost so far.

    Under `exact` the steps that compute a prompt wait for each expert that its tokens choose and that is absent. So
    `dE` is the expected number of these, times the average wait for a missing expert. Before the first wait it takes
    the time of the expert's bytes at the measured bandwidth. What the answer waits for later is in
    `Estimates.miss_wait`.

    Under `resident` no step waits: loads go on in the background, and a step only commits what has come. So `dE` is the
    time of a commit, times the number of the task's hot experts that are absent. That is an upper bound, as other
    running requests keep some slots. A policy that follows requests loads nothing in layers that a task is insensitive
    to. A policy that keeps its experts, or its one forecast, loads nothing for a request. Substitutes cost quality and
    no time, so they are no part of `dE`.
    """

    def __init__(self, profile: TaskProfile | None, residency: Residents):
        self.experts = TaskExperts(profile, residency.table.capacities)
        self._by_slots = {residency.table.capacities: self.experts}  # slots may change in a few ways
        self._profile = profile
        self._residency = residency

    def seconds(self, sequence: Sequence) -> float:
        """How long running requests are held up by the experts of an admitted one; 0 before anything was loaded."""
        residency = self._residency
        capacities = residency.table.capacities
        if capacities not in self._by_slots:
            self._by_slots[capacities] = TaskExperts(self._profile, capacities)
        experts, resident, stats = self._by_slots[capacities], residency.table.resident_mask, residency.loads
        if sequence.routing != "resident":
            tokens = sequence.num_tokens - max(sequence.num_computed, sequence.num_cached)
            wanted = experts.wanted(sequence.task, tokens, resident)
            if stats.waited_loads:
                return wanted * stats.wait_seconds / stats.waited_loads
            return wanted * residency.expert_bytes / stats.bandwidth if stats.bandwidth else 0.0
        kind = POLICIES[residency.policy_name]
        if not stats.loads or not kind.exchanges or kind.one_forecast:
            return 0.0
        missing = experts.missing(sequence.task, resident, sensitive=kind.follows_requests)
        return missing * stats.commit_seconds / stats.loads
