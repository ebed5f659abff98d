"""Policies that learn nothing beforehand: a fixed set, least recently used, least frequently used."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Shaped

from emoe_jax.policies.rule import ExpectedWishes, Matrix, Rule, namespace

_LONG_AGO = 1e6  # steps; single precision counts well beyond it


class FixedState(NamedTuple):
    """The plan, as wishes per step `[*lead, M, E]`, and nothing observed."""

    rates: Matrix


class Fixed(Rule[FixedState]):
    """The experts that the plan expects most, whatever routers wish: the paper's, by whatever it plans with."""

    def start(self, rates: Float[Any, "M E"]) -> FixedState:
        """The first plan; `rates` are expected wishes per step and expert."""
        return FixedState(rates)

    def plan(self, state: FixedState, expected: ExpectedWishes) -> FixedState:
        """The new plan replaces the old one."""
        return FixedState(expected.rates)

    def observe(self, state: FixedState, counts: Shaped[Any, "M E"], steps: int = 1) -> FixedState:
        """The state as it is: wishes change nothing."""
        return state

    def scores(self, state: FixedState) -> Matrix:
        """The planned wishes per step."""
        return state.rates


class LruState(NamedTuple):
    """How many steps ago each expert was last wished for, `[*lead, M, E]`."""

    age: Matrix  # steps since the expert was wished for, less a part of a step for its share of that step's wishes


class Lru(Rule[LruState]):
    """An expert that is wished for but absent replaces the resident one that was not wished for longest."""

    # Scores of experts wished for in the same step differ by less, so they never replace each other.
    margin = 0.5

    def start(self, rates: Float[Any, "M E"]) -> LruState:
        """Every expert was last wished for long ago. Of `rates` only the shape counts, and so all experts are alike."""
        return LruState(namespace(rates).full_like(rates, _LONG_AGO))

    def observe(self, state: LruState, counts: Shaped[Any, "M E"], steps: int = 1) -> LruState:
        """Experts that were wished for become 0 steps old, those with a larger share of the wishes a little younger."""
        xp = namespace(counts)
        # Among equally recent ones the more wished-for is first.
        share = counts / xp.maximum(counts.sum(-1).max(), 1)
        return LruState(xp.where(counts > 0, -0.5 * share, xp.minimum(state.age + steps, _LONG_AGO)))

    def scores(self, state: LruState) -> Matrix:
        """The age in steps, negated: 0 or a little more for an expert wished for in the last step."""
        return -state.age


class LfuState(NamedTuple):
    """How often each expert was wished for since the start, `[*lead, M, E]`."""

    counts: Matrix


class Lfu(Rule[LfuState]):
    """The experts wished for most often since the start."""

    def start(self, rates: Float[Any, "M E"]) -> LfuState:
        """No wishes yet. Of `rates` only the shape counts, and so all experts are alike."""
        return LfuState(namespace(rates).zeros_like(rates))

    def observe(self, state: LfuState, counts: Shaped[Any, "M E"], steps: int = 1) -> LfuState:
        """Adds the wishes. Nothing decays, so `steps` does not matter."""
        return LfuState(state.counts + counts)

    def scores(self, state: LfuState) -> Matrix:
        """Wishes since the start."""
        return state.counts


def random_rates(num_layers: int, num_experts: int, seed: int = 0) -> Float[np.ndarray, "M E"]:
    """A plan that knows nothing, for the policy `random`."""
    return np.random.default_rng(seed).random((num_layers, num_experts), np.float32)
