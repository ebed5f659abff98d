"""The admission policy of an engine: what the scheduler may know of its model and its experts."""

from emoe_jax.engine.request import RoutingContract
from emoe_jax.experts.residency import Residency
from emoe_jax.scheduling.policy import AdmissionPolicy
from emoe_jax.scheduling.registry import make_admission_policy
from emoe_jax.scheduling.scheduler import Scheduler
from emoe_jax.tasks import TaskProfile
from emoe_jax.tasks.experts import TaskExperts


def admission_policy(
    name: str, profile: TaskProfile | None, residency: Residency, scheduler: Scheduler
) -> AdmissionPolicy:
    """The policy of that name for a scheduler's limits. Raises `ConfigError` for an unknown name."""
    loading = ExpertLoading(profile, residency)
    return make_admission_policy(
        name,
        max_num_seqs=scheduler.max_num_seqs,
        max_model_len=scheduler.max_model_len,
        prefill_chunk=scheduler.prefill_chunk,
        profile=profile,
        loading_seconds=loading.seconds,
        affinity=loading.experts.affinity,
    )


class ExpertLoading:
    """`dE` of eMoE eq. 3, from what loads have cost so far.

    Under `exact` a step waits for missing experts: as long as it waited for one on average, or before the first wait
    as long as its bytes take at the measured bandwidth. Under `resident` it only pays for committing them.
    """

    def __init__(self, profile: TaskProfile | None, residency: Residency):
        self.experts = TaskExperts(profile, residency.table.capacities)
        self._by_slots = {residency.table.capacities: self.experts}  # slots may change in a few ways
        self._profile = profile
        self._residency = residency

    def seconds(self, task: str | None, routing: RoutingContract) -> float:
        """How long running requests are held up by the hot experts of a task; 0 before anything was loaded."""
        residency = self._residency
        capacities = residency.table.capacities
        if capacities not in self._by_slots:
            self._by_slots[capacities] = TaskExperts(self._profile, capacities)
        missing = self._by_slots[capacities].missing(task, residency.table.resident_mask)
        if not missing:
            return 0.0
        stats = residency.loads
        if routing == "exact":
            if stats.waited_loads:
                return missing * stats.wait_seconds / stats.waited_loads
            return missing * residency.slab.layout.nbytes / stats.bandwidth if stats.bandwidth else 0.0
        return missing * stats.commit_seconds / stats.loads if stats.loads else 0.0
