"""Policies by the names they have on the command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from emoe_jax.errors import ConfigError
from emoe_jax.policies.caching import Fixed, Lfu, Lru, random_rates
from emoe_jax.policies.dynamics import Dynamics
from emoe_jax.policies.policy import ResidencyPolicy
from emoe_jax.policies.refresh import Refresh
from emoe_jax.policies.rivals import ActivationMatrix, NextLayerRouter
from emoe_jax.policies.rule import Rule
from emoe_jax.policies.transitions import TRANSITIONS_FILE

_COMMAND = "`python -m train.predictor --traces FILE --out DIR`"

PAPER_PREDICT_EVERY = 40
"""eMoE's p."""

PlannedBy = Literal["prompt", "task", "global", "none"]
"""What a policy plans with: the predictor's word on each prompt, its task's mean routing, that of all, nothing."""


@dataclasses.dataclass(frozen=True)
class PolicyWeights:
    """Arrays that policies have learned from traces. None stands for one that was not learned."""

    dynamics: Dynamics | None = None
    transitions: Float[np.ndarray, "M1 E E"] | None = None  # see `NextLayerRouter`
    matrices: Float[np.ndarray, "P M E"] | None = None  # see `ActivationMatrix`


class PolicyKind(NamedTuple):
    """How a policy is made and what the engine has to do for it."""

    forecast: PlannedBy
    rule: Callable[[int, int, PolicyWeights], Rule[Any]]  # of the numbers of MoE layers and experts
    follows_requests: bool = False  # whether it has to be told of the requests that start and end
    predict_every: int | None = None  # prompts that share a prediction where the user does not say; None: automatic
    one_forecast: bool = False  # whether a prediction serves all next prompts, and not only those of its task
    exchanges: bool = True  # whether it ever loads other experts than those that it starts with
    looks_ahead: bool = False  # whether an `exact` step asks for what the next layer's router would choose


def _refresh(num_layers: int, num_experts: int, known: PolicyWeights) -> Rule[Any]:
    return Refresh(known.dynamics or Dynamics.untrained(num_layers, num_experts))


def _next_layer(num_layers: int, num_experts: int, known: PolicyWeights) -> Rule[Any]:
    if known.transitions is None:
        raise ConfigError(
            f"policy 'next-layer-router' needs a table of transitions, which is learned from a trace: {_COMMAND} "
            f"writes {TRANSITIONS_FILE} into the predictor's directory"
        )
    return NextLayerRouter(known.transitions)


def _activation(num_layers: int, num_experts: int, known: PolicyWeights) -> Rule[Any]:
    if known.matrices is None:
        raise ConfigError(
            "policy 'activation-matrix' needs recorded activations, which are learned from a trace: they come with a "
            f"predictor, which {_COMMAND} makes"
        )
    return ActivationMatrix(known.matrices)


POLICIES: dict[str, PolicyKind] = {
    "emoe": PolicyKind("prompt", _refresh, follows_requests=True),
    # One prediction per prompt or per few prompts, nothing learned from what routers wish for.
    "emoe-no-refresh": PolicyKind("prompt", lambda *_: Fixed(), follows_requests=True),
    # The paper's own setting: one forecast for the next 40 prompts.
    "emoe-paper": PolicyKind(
        "prompt", lambda *_: Fixed(), follows_requests=True, predict_every=PAPER_PREDICT_EVERY, one_forecast=True
    ),
    "lru": PolicyKind("none", lambda *_: Lru()),
    "lfu": PolicyKind("none", lambda *_: Lfu()),
    # `lru` between steps. A `resident` step stops at no router, so it looks ahead in `exact` ones only.
    "pre-gated": PolicyKind("none", lambda *_: Lru(), looks_ahead=True),
    "static-task": PolicyKind("task", lambda *_: Fixed(), follows_requests=True),
    "static-global": PolicyKind("global", lambda *_: Fixed(), exchanges=False),
    "static": PolicyKind("global", lambda *_: Fixed(), exchanges=False),  # whatever it is given to start with
    "random": PolicyKind("none", lambda *_: Fixed(), exchanges=False),
    "next-layer-router": PolicyKind("global", _next_layer),
    "activation-matrix": PolicyKind("global", _activation, follows_requests=True),
}


def make_policy(
    name: str,
    num_layers: int,
    num_experts: int,
    rates: Float[np.ndarray, "M E"] | None = None,
    knowledge: PolicyWeights | None = None,
    seed: int = 0,
) -> ResidencyPolicy:
    """A policy for an engine. `rates` are what to start with (see `ExpectedWishes`); `random` draws its own by `seed`.

    Raises `ConfigError` with the names there are, and where the policy needs what is not known.
    """
    if name not in POLICIES:
        raise ConfigError(f"unknown residency policy {name!r}; expected one of {', '.join(sorted(POLICIES))}")
    rule = POLICIES[name].rule(num_layers, num_experts, knowledge or PolicyWeights())
    if name == "random":
        rates = random_rates(num_layers, num_experts, seed)
    return ResidencyPolicy(rule, num_layers, num_experts, rates)
