"""The policy `emoe`: the plan as prior, refreshed in the background by what routers wish for."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Shaped

from emoe_jax.policies.dynamics import Dynamics
from emoe_jax.policies.rule import Matrix, Plan, Rule, namespace

MARGIN = 0.12
"""Wishes per step that a swap must gain. docs/residency.md says how it was chosen."""


class RefreshState(NamedTuple):
    rates: Matrix  # as planned
    recent: Float[Any, "*lead K M E"]  # decayed mean of wishes per step, one for each half-life, begun at the plan
    latent: Float[Any, "*lead J r"]  # decayed mean of how wishes deviate from the plan, along few directions


class Refresh(Rule[RefreshState]):
    """Scores are the wishes per step expected over the next few steps, linear in everything observed (`Dynamics`).

    Being linear, what holds for one request holds for a batch: the sum of the forecasts is the forecast of the sum.
    """

    def __init__(self, dynamics: Dynamics, margin: float = MARGIN):
        self.margin = margin
        self._dynamics = dynamics
        self._keep = dynamics.keep[:, None, None]
        self._latent_keep = dynamics.latent_keep[:, None]

    def start(self, rates: Float[Any, "M E"]) -> RefreshState:
        xp = namespace(rates)
        dynamics = self._dynamics
        latent = (len(dynamics.latent_half_lives), dynamics.directions.shape[1])
        recent = xp.broadcast_to(rates, (len(dynamics.half_lives), *rates.shape))
        return RefreshState(rates, recent, xp.zeros(latent, np.float32))

    def plan(self, state: RefreshState, plan: Plan) -> RefreshState:
        kept = np.float32(plan.kept) if isinstance(plan.kept, float) else plan.kept
        return RefreshState(plan.rates, kept * state.recent + plan.joined, kept * state.latent)

    def observe(self, state: RefreshState, counts: Shaped[Any, "M E"], steps: int = 1) -> RefreshState:
        wishes = counts.astype(np.float32) / np.float32(steps)
        deviation = (wishes - state.rates).reshape(-1) @ self._dynamics.directions
        recent = state.recent + (1 - self._keep**steps) * (wishes - state.recent)
        latent = state.latent + (1 - self._latent_keep**steps) * (deviation - state.latent)
        return RefreshState(state.rates, recent, latent)

    def scores(self, state: RefreshState) -> Matrix:
        xp = namespace(state.rates)
        weights = self._dynamics.weights
        lead = state.latent.shape[:-2]
        rest = (state.latent.reshape(*lead, -1) @ self._dynamics.readout).reshape(state.rates.shape)
        return weights[0] * state.rates + xp.einsum("k,...kme->...me", weights[1:], state.recent) + rest
