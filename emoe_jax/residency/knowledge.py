"""What a checkpoint directory brings along about its model's routing, for planning which experts are resident."""

import dataclasses
from pathlib import Path

import numpy as np
from jaxtyping import Float

from emoe_jax.config import ModelConfig
from emoe_jax.engine_config import PredictEvery
from emoe_jax.policies import POLICIES, PolicyWeights
from emoe_jax.policies.dynamics import DYNAMICS_FILE, Dynamics
from emoe_jax.policies.regret import Regret
from emoe_jax.policies.rivals import activation_matrices
from emoe_jax.policies.transitions import TRANSITIONS_FILE, load_transitions
from emoe_jax.predictor import Predictor
from emoe_jax.residency.capacities import split_slots
from emoe_jax.residency.planner import ResidencyPlanner
from emoe_jax.tasks import TaskProfile

PROFILE_FILE = "task_profile.json"
PREDICTOR_FOLDER = "predictor"


@dataclasses.dataclass(frozen=True)
class RoutingKnowledge:
    """All that is known before the first request; None where nothing is."""

    profile: TaskProfile | None
    predictor: Predictor | None
    dynamics: Dynamics | None
    transitions: Float[np.ndarray, "M1 E E"] | None
    predictor_path: Path | None = None
    """Where the predictor was found."""

    @classmethod
    def load(
        cls,
        directory: Path,
        config: ModelConfig,
        task_profile: str | Path | None,
        predictor: str | Path | None,
    ) -> "RoutingKnowledge":
        """ "auto" is what the checkpoint directory has, if it has it; a path must be there; None is nothing.

        Raises `ConfigError` or `PredictorError` when something is damaged or of another model.
        """
        profile_path = _found(task_profile, directory / PROFILE_FILE)
        predictor_path = _found(predictor, directory / PREDICTOR_FOLDER)
        profile = loaded = dynamics = transitions = None
        num_layers, num_experts = len(config.moe_layers), config.num_experts
        if profile_path is not None:
            profile = TaskProfile.load(profile_path)
            profile.check(config)
        if predictor_path is not None:
            loaded = Predictor.load(predictor_path)
            loaded.config.check_model(num_layers, num_experts, config.top_k, "the served model")
            if (path := predictor_path / DYNAMICS_FILE).exists():
                dynamics = Dynamics.load(path, num_layers, num_experts)
            if (path := predictor_path / TRANSITIONS_FILE).exists():
                transitions = load_transitions(path, num_layers, num_experts, config.top_k)
        return cls(profile, loaded, dynamics, transitions, predictor_path)

    def for_policies(self) -> PolicyWeights:
        """What policies learn from traces."""
        matrices = None if self.predictor is None else activation_matrices(self.predictor.trained.counts)
        return PolicyWeights(self.dynamics, self.transitions, matrices)

    def rates(self, config: ModelConfig) -> np.ndarray | None:
        """What one request of no known task is expected to wish for per step, `[M, E]`; None without a profile."""
        if self.profile is None:
            return None
        return (config.top_k * self.profile.frequency(None)).astype(np.float32)

    def split(self, capacities: tuple[int, ...], config: ModelConfig) -> tuple[int, ...]:
        """The same number of slots, more of them in layers where they cover more by the task profile."""
        tasks = {} if self.profile is None else self.profile.tasks
        routed = [task.routing for task in tasks.values() if task.routing is not None]
        return tuple(split_slots(sum(capacities), np.stack(routed), config.top_k)) if routed else capacities

    def planner(
        self, policy: str, config: ModelConfig, capacities: tuple[int, ...], predict_every: PredictEvery
    ) -> ResidencyPlanner | None:
        """The planner that the policy needs; None for one that is not told of requests. "auto" is the policy's own
        number of prompts per prediction, where it has one."""
        kind = POLICIES[policy]
        if not kind.follows_requests:
            return None
        forecast = kind.forecast
        profile = self.profile or TaskProfile.empty(config)
        if forecast == "global":
            profile = profile.routed_alike()
        predictor = self.predictor if forecast == "prompt" else None
        if predict_every == "auto":
            predict_every = kind.predict_every or "auto"
        return ResidencyPlanner(
            profile,
            capacities,
            predictor,
            predict_every,
            learns=forecast == "prompt",
            one_forecast=kind.one_forecast,
        )

    def regret(self, config: ModelConfig, capacities: tuple[int, ...]) -> Regret:
        """What other policies would cover with as many slots."""
        frequency = None if self.profile is None else self.profile.frequency
        return Regret(capacities, config.num_experts, config.top_k, frequency, self.rates(config))


def _found(given: str | Path | None, usual: Path) -> Path | None:
    if given == "auto":
        return usual if usual.exists() else None
    return None if given is None else Path(given)
