"""Experts of a simulated machine: the engine's own slots, planner and residency policy; only loads are made up."""

import dataclasses
from collections import deque
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from benchmarks.serving.devices import ExpertTimes
from benchmarks.serving.settings import ALL, Setting
from emoe_jax.amounts import parse_expert_memory
from emoe_jax.config import ModelConfig
from emoe_jax.experts.loader_stats import LoaderStats
from emoe_jax.experts.record_format import RecordFormat
from emoe_jax.experts.table import SlotTable
from emoe_jax.memory.budget import capacities
from emoe_jax.models import config_from_directory
from emoe_jax.policies import Swap, make_policy
from emoe_jax.requests.contract import RoutingContract
from emoe_jax.requests.sequence import Sequence
from emoe_jax.residency.foresight import progress_of
from emoe_jax.residency.knowledge import RoutingKnowledge
from emoe_jax.residency.residency import SWAPS_PER_LAYER
from emoe_jax.scheduling.plan import StepPlan
from emoe_jax.scheduling.scheduler import Scheduler
from emoe_jax.tasks import TaskProfile

POLICY = "emoe"
LOOK_SECONDS = 0.03
"""Between two looks at what the policy prefers. The engine spends 0.3 % of its time on looks of about 0.1 ms."""


@dataclasses.dataclass(frozen=True)
class ModelExperts:
    """A model's experts, and what its checkpoint knows of its routing. The predictor is left out: simulated prompts
    have no embeddings, so plans go by the tasks' mean routing.
    """

    config: ModelConfig
    knowledge: RoutingKnowledge
    profile: TaskProfile

    @classmethod
    def demo(cls) -> "ModelExperts":
        """Of the bundled model."""
        from serve.options import DEMO_MODEL

        config = config_from_directory(DEMO_MODEL)
        knowledge = RoutingKnowledge.load(DEMO_MODEL, config, "auto", "auto")
        assert knowledge.profile is not None
        return cls(config, dataclasses.replace(knowledge, predictor=None), knowledge.profile)


class StepLoads(NamedTuple):
    """Seconds that a step takes longer: for commits, and for waiting."""

    commits: float = 0.0
    waited: float = 0.0


class SimulatedExperts:
    """Stands for `Residency` and `Foresight`: call `arrived`, `before_step` with each step, then `ended`.

    Tokens choose experts by their task's mean routing, each layer and token on its own. Loads in the background come
    one after the other. Under `exact` a step waits for each expert that its tokens choose and that is absent.
    """

    policy_name = POLICY

    def __init__(self, model: ModelExperts, setting: Setting, times: ExpertTimes, seed: int = 0):
        """Raises `ConfigError` for a residency that the model cannot have."""
        config, known = model.config, model.knowledge
        record_format = RecordFormat.of(config, "float32")
        slots = tuple(capacities(config, record_format, parse_expert_memory(setting.residency or ALL)))
        slots = known.split(slots, config)
        shape = (len(config.moe_layers), config.num_experts)
        self.profile = model.profile
        self.table = SlotTable(slots, config.num_experts)
        self.loads = LoaderStats()
        self.expert_bytes = record_format.nbytes
        self.routing: RoutingContract = setting.routing or "resident"
        self.is_full = all(capacity == config.num_experts for capacity in slots)
        self._policy = make_policy(POLICY, *shape, known.rates(config), known.for_policies())
        self._planner = known.planner(POLICY, config, slots, "auto")
        self._top_k = config.top_k
        self._times = times
        self._rng = np.random.default_rng(seed)
        self._coming: deque[tuple[float, Swap]] = deque()  # and when they are there
        self._next_look = 0.0
        self.wished = self.covered = 0
        """Choices of tokens since the start, and those of them whose expert was resident when the step began."""
        for layer, experts in enumerate(self._policy.initial(slots)):
            for slot, expert in enumerate(experts.tolist()):
                self.table.assign(layer, slot, expert)

    def serves(self) -> dict[str, float]:
        """What an engine publishes: by task, the share of its routing that the residents are expected to cover."""
        return {} if self._planner is None else self._planner.serves(self.table.resident_mask)

    def arrived(self, sequence: Sequence) -> None:
        """A request came."""
        if self._planner is not None and not self.is_full:
            prompt, most = len(sequence.prompt_token_ids), sequence.params.max_tokens
            self._planner.begin(sequence.request_id, sequence.task, prompt, most, None)

    def before_step(self, plan: StepPlan, scheduler: Scheduler, now: float) -> StepLoads:
        """Commit what has come, plan for the requests at hand, and load what the step's tokens need."""
        if self.is_full:
            return StepLoads()
        committed = self._commit(now)
        expected = None if self._planner is None else self._planner.plan_for(progress_of(plan, scheduler))
        wishes = self._wishes(plan)
        self.wished += int(wishes.sum())
        self.covered += int(wishes[self.table.resident_mask].sum())
        if expected is not None:
            self._policy.plan(expected)
            self._follow(now, self.table.num_experts)
        missed = self._load_now(wishes) if self.routing == "exact" else 0
        self._policy.observe(wishes)
        if now >= self._next_look:
            self._next_look = now + LOOK_SECONDS
            self._follow(now, min(SWAPS_PER_LAYER, plan.num_tokens))
        loads = StepLoads(committed * self._times.commit, missed * self._times.wait)
        stats, bytes_moved = self.loads, (committed + missed) * self.expert_bytes
        self.loads = dataclasses.replace(
            stats,
            loads=stats.loads + committed + missed,
            loaded_bytes=stats.loaded_bytes + bytes_moved,
            staged_bytes=stats.staged_bytes + bytes_moved,
            busy_seconds=stats.busy_seconds + (committed + missed) * self._times.load,
            commit_seconds=stats.commit_seconds + loads.commits,
            waited_loads=stats.waited_loads + missed,
            wait_seconds=stats.wait_seconds + loads.waited,
        )
        return loads

    def ended(self, sequence: Sequence) -> None:
        """A request ended."""
        if self._planner is not None:
            self._planner.end(sequence.request_id, None)

    def _wishes(self, plan: StepPlan) -> Int[np.ndarray, "M E"]:
        """How many of the step's tokens choose each expert."""
        tokens: dict[str | None, int] = {}
        for sequence in plan.decodes:
            tokens[sequence.task] = tokens.get(sequence.task, 0) + 1
        for chunk in plan.prefills:
            tokens[chunk.sequence.task] = tokens.get(chunk.sequence.task, 0) + chunk.length
        drawn = [
            self._rng.multinomial(count * self._top_k, self.profile.frequency(task)) for task, count in tokens.items()
        ]
        return np.sum(drawn, axis=0)

    def _commit(self, now: float) -> int:
        """How many loads have come and found their place."""
        count = 0
        while self._coming and self._coming[0][0] <= now:
            _, swap = self._coming.popleft()
            if not self.table.is_resident(swap.layer, swap.load) and self.table.is_resident(swap.layer, swap.evict):
                self.table.assign(swap.layer, self.table.slot(swap.layer, swap.evict), swap.load)
                count += 1
        return count

    def _follow(self, now: float, limit: int) -> None:
        """Ask for what the policy now prefers."""
        busy = np.zeros(self.table.resident_mask.shape, bool)
        for _, swap in self._coming:
            busy[swap.layer, [swap.load, swap.evict]] = True
        for swap in self._policy.swaps(self.table.resident_mask, limit, busy):
            begin = max(now, self._coming[-1][0] if self._coming else now)
            self._coming.append((begin + self._times.load, swap))

    def _load_now(self, wishes: Int[np.ndarray, "M E"]) -> int:
        """Load absent experts that tokens chose, in place of those of the lowest scores. How many were absent."""
        missing = (wishes > 0) & ~self.table.resident_mask
        scores = self._policy.scores()
        for layer in np.flatnonzero(missing.any(axis=1)).tolist():
            resident = self.table.resident(layer)
            # Chosen ones stay, unless the layer has too few slots for all that were chosen.
            order = resident[np.lexsort((scores[layer, resident], wishes[layer, resident] > 0))]
            for expert, evicted in zip(np.flatnonzero(missing[layer]).tolist(), order.tolist(), strict=False):
                self.table.assign(layer, self.table.slot(layer, evicted), expert)
        return int(missing.sum())
