"""The policy `emoe`: the plan as prior, refreshed in the background by what routers wish for."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Shaped

from emoe_jax.policies.answer import log_own, network_share, num_requests, wishes
from emoe_jax.policies.dynamics import Dynamics
from emoe_jax.policies.rule import ExpectedWishes, Matrix, Rule, namespace

BASE_MARGIN, SHARE_MARGIN = 0.02, 0.13
"""Wishes per step that a swap must gain: the first, and the second times the share of experts that are resident. Where
few are, there is more to gain by a swap than by keeping the link free. They were chosen by replay:
docs/explanation/residency.md."""


class RefreshState(NamedTuple):
    """The plan and decayed means of what was observed, per expert and along directions, for a few half-lives."""

    rates: Matrix  # as planned
    recent: Float[Any, "*lead half_lives M E"]
    """Decayed means of the wishes per step, one for each half-life. They begin at the plan."""
    latent: Float[Any, "*lead latent_half_lives r"]
    """Decayed means of how wishes deviate from the plan, along a few directions."""


class Refresh(Rule[RefreshState]):
    """Scores are the wishes per step expected over the next few steps, linear in everything observed (`Dynamics`).

    The linear part of a batch is the sum of its requests' forecasts. The network takes the batch's mean request and
    counts the less, the more requests there are (`network_share`).
    """

    margin = BASE_MARGIN
    share_margin = SHARE_MARGIN

    def __init__(self, dynamics: Dynamics):
        self._dynamics = dynamics
        # One matrix product reads the latent means once for everything that is made of them.
        network = dynamics.network
        self._mix = dynamics.readout
        if network is not None:
            self._mix = np.concatenate([dynamics.readout, network.linear, network.up], axis=1)
        self._keep = dynamics.keep[:, None, None]
        self._latent_keep = dynamics.latent_keep[:, None]

    def start(self, rates: Float[Any, "M E"]) -> RefreshState:
        """Every mean begins at the planned `rates`, and no wish deviates from them yet."""
        xp = namespace(rates)
        dynamics = self._dynamics
        latent = (len(dynamics.latent_half_lives), dynamics.directions.shape[1])
        recent = xp.broadcast_to(rates, (len(dynamics.half_lives), *rates.shape))
        return RefreshState(rates, recent, xp.zeros(latent, np.float32))

    def plan(self, state: RefreshState, expected: ExpectedWishes) -> RefreshState:
        """The new plan. Means keep the share of the requests that go on. New requests enter at their planned rates."""
        share = expected.continuing
        share = np.float32(share) if isinstance(share, float) else share
        return RefreshState(expected.rates, share * state.recent + expected.joined[None], share * state.latent)

    def observe(self, state: RefreshState, counts: Shaped[Any, "M E"], steps: int = 1) -> RefreshState:
        """Requests that wish for nothing, since their prompts are read (`read`), stay as they are."""
        return self._towards(state, counts.astype(np.float32) / np.float32(steps), steps) if steps else state

    def read(self, state: RefreshState, counts: Shaped[Any, "M E"], tokens: int) -> RefreshState:
        """The same as that many steps of one request, were its wishes in each of them their mean."""
        return self._towards(state, counts.astype(np.float32) / np.float32(tokens), tokens)

    def _towards(self, state: RefreshState, wishes: Matrix, steps: int) -> RefreshState:
        """`steps` steps in which some of the requests wish for this; the others stay as they are."""
        xp = namespace(state.rates)
        planned = xp.maximum(state.rates.sum(), np.float32(1e-6))
        part = xp.minimum(wishes.sum() / planned, np.float32(1))  # of the requests, as each wishes for `top_k`
        deviation = (wishes - part * state.rates).reshape(-1) @ self._dynamics.directions
        recent = state.recent + (1 - self._keep**steps) * (wishes[None] - part * state.recent)
        latent = state.latent + (1 - self._latent_keep**steps) * (deviation[None] - part * state.latent)
        return RefreshState(state.rates, recent, latent)

    def own(self, state: RefreshState) -> Matrix:
        """What an expert's planned rate and its own decayed means say, without those of others."""
        xp, weights = namespace(state.rates), self._dynamics.weights
        return weights[0] * state.rates + xp.einsum("k,...kme->...me", weights[1:], state.recent)

    def scores(self, state: RefreshState) -> Matrix:
        """Wishes per step expected over the next few steps, `[*lead, M, E]`."""
        own, shape, dynamics = self.own(state), state.rates.shape, self._dynamics
        size = dynamics.readout.shape[1]
        mixed = state.latent.reshape(*state.latent.shape[:-2], -1) @ self._mix
        linear = own + mixed[..., :size].reshape(shape)
        if dynamics.network is None:
            return linear
        requests = num_requests(state.rates, dynamics.top_k)
        each = mixed / requests[..., None]
        logs = log_own(own, requests, dynamics.top_k)
        logits = dynamics.network.logits(logs, each[..., size : 2 * size], each[..., 2 * size :])
        share = network_share(requests)[..., None, None]
        return linear + share * (wishes(logits, shape, requests, dynamics.top_k) - linear)
