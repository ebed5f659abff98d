"""What others do: prefetch the next layer's experts (Pre-gated MoE), match recorded activations (MoE-Infinity)."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, Shaped

from emoe_jax.policies.rule import ExpectedWishes, Matrix, Rule, namespace


class NextLayerState(NamedTuple):
    """The plan, and the wishes from which the next layer's follow. Both are `[*lead, M, E]`."""

    rates: Matrix
    last: Matrix  # wishes of the step observed last


class NextLayerRouter(Rule[NextLayerState]):
    """A layer's experts by the choices of the layer before it, through a table of how often one follows the other.

    In replay, layer m + 1 is loaded within a step, when layer m has chosen. In the engine the choices are those of the
    step before: `pre-gated` is the policy that looks ahead within a step. The first layer has none before it and keeps
    to the plan.
    """

    def __init__(self, transitions: Float[np.ndarray, "M1 E E"], margin: float = 0.0):
        """`transitions[m, i, j]`: the share of tokens with expert `i` in layer m that have `j` in layer m + 1."""
        self.margin = margin
        self._transitions = transitions.astype(np.float32)

    def start(self, rates: Float[Any, "M E"]) -> NextLayerState:
        """The planned `rates` stand for the wishes of a step that has not been seen."""
        return NextLayerState(rates, rates)

    def plan(self, state: NextLayerState, expected: ExpectedWishes) -> NextLayerState:
        """The new plan. The wishes of the last step stay."""
        return NextLayerState(expected.rates, state.last)

    def observe(self, state: NextLayerState, counts: Shaped[Any, "M E"], steps: int = 1) -> NextLayerState:
        """The new wishes replace those of the step before. With `steps` above 1 they are sums over these steps."""
        return NextLayerState(state.rates, counts.astype(np.float32))

    def read(self, state: NextLayerState, counts: Shaped[Any, "M E"], tokens: int) -> NextLayerState:
        """The wishes of a prompt's chunk are added to those of the step that it ran in."""
        return NextLayerState(state.rates, state.last + counts)

    def scores(self, state: NextLayerState) -> Matrix:
        """The first layer's planned rates. Other layers get what follows the one before, scaled to the planned sum."""
        xp = namespace(state.last)
        following = xp.einsum("...mi,mij->...mj", state.last[..., :-1, :], self._transitions)
        wished = xp.maximum(state.last[..., :-1, :].sum(-1, keepdims=True), 1)
        planned = state.rates[..., 1:, :].sum(-1, keepdims=True)
        return xp.concatenate([state.rates[..., :1, :], following / wished * xp.maximum(planned, 1)], axis=-2)


MOST_MATRICES = 256
"""Recorded prompts to be matched, the latest; every look at the policy compares with each of them."""


def activation_matrices(counts: Int[np.ndarray, "P M E"]) -> Float[np.ndarray, "n M E"]:
    """What `ActivationMatrix` matches, from how often recorded prompts, in order, chose each expert."""
    counts = counts[counts.sum((1, 2)) > 0][-MOST_MATRICES:]
    return (counts / np.maximum(counts.sum(-1, keepdims=True), 1)).astype(np.float32)


class ActivationState(NamedTuple):
    """The plan, and the wishes of the running requests. Both are `[*lead, M, E]`."""

    rates: Matrix
    counts: Matrix  # of the running requests since they started


class ActivationMatrix(Rule[ActivationState]):
    """The recorded prompts whose wishes are most like those of the running requests tell which wishes come next."""

    # How sharply the most alike (by cosine) outweigh others, and how many wishes per layer the plan counts for.
    sharpness = 50.0
    planned_tokens = 8.0

    def __init__(self, matrices: Float[np.ndarray, "P M E"], margin: float = 0.05):
        """`matrices`: recorded prompts' wishes, each layer as shares."""
        self.margin = margin
        flat = matrices.reshape(len(matrices), -1).astype(np.float32)
        self._matrices = flat
        self._directions = flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-12)

    def start(self, rates: Float[Any, "M E"]) -> ActivationState:
        """The plan counts as `planned_tokens` tokens that were observed."""
        return ActivationState(rates, rates * self.planned_tokens)

    def plan(self, state: ActivationState, expected: ExpectedWishes) -> ActivationState:
        """The new plan. Requests that go on keep their wishes; new ones count as `planned_tokens` tokens each."""
        return ActivationState(
            expected.rates, expected.continuing * state.counts + self.planned_tokens * expected.joined
        )

    def observe(self, state: ActivationState, counts: Shaped[Any, "M E"], steps: int = 1) -> ActivationState:
        """Adds the wishes. Nothing decays, so `steps` does not matter."""
        return ActivationState(state.rates, state.counts + counts)

    def scores(self, state: ActivationState) -> Matrix:
        """The mean of the recorded matrices, weighted by likeness, scaled to as many wishes per layer as planned."""
        xp = namespace(state.counts)
        shape = state.counts.shape
        flat = state.counts.reshape(*shape[:-2], -1)
        flat = flat / xp.maximum(xp.sqrt((flat**2).sum(-1, keepdims=True)), 1e-12)
        weights = xp.exp(self.sharpness * (flat @ self._directions.T - 1))
        matched = (weights @ self._matrices) / xp.maximum(weights.sum(-1, keepdims=True), 1e-30)
        planned = state.rates.sum(-1, keepdims=True)
        return matched.reshape(shape) * xp.maximum(planned, 1)
