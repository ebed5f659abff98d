"""What a residency policy is: scores of experts that follow from what was planned and what routers wished.

Everything here is a pure function of arrays, NumPy's or JAX's: the engine calls it step by step with the one, replay
compiles it with the other.
"""

import abc
from types import ModuleType
from typing import Any, Generic, NamedTuple, TypeVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Shaped

Matrix = Float[Any, "*lead M E"]  # of NumPy or JAX
State = TypeVar("State", bound=tuple[Any, ...])
"""A named tuple of arrays."""


class ExpectedWishes(NamedTuple):
    """What the running requests are expected to wish for, told whenever that changes.

    Requests wish independently, so `rates` and `joined` are sums over requests: top-k times the request's predicted
    share of each expert.
    """

    rates: Float[Any, "M E"]
    """Expected wishes per step."""
    joined: Float[Any, "M E"]
    """Those of them by requests that start now."""
    continuing: Float[Any, ""] | float
    """The share of the requests running before that go on. What was observed is theirs in that part."""
    sensitivity: Float[Any, " M"] | None = None
    """How much a wrong expert harms in each layer, 0 to 1, averaged over running requests (`s` of eMoE eq. 2). None is
    1 everywhere."""


class Rule(abc.ABC, Generic[State]):
    """Experts have scores; the highest-scoring ones of a layer should be resident.

    `margin` is by how much an absent expert must be ahead of the resident one it replaces, so that near ties do not
    make experts take turns; `share_margin` adds to it by the share of a layer's experts that are resident. States are
    never changed in place.
    """

    margin: float = 0.0
    share_margin: float = 0.0

    @abc.abstractmethod
    def start(self, rates: Float[Any, "M E"]) -> State:
        """The state before anything was observed. `rates` are as in `ExpectedWishes`; zeros where nothing is known."""

    def plan(self, state: State, expected: ExpectedWishes) -> State:
        """Requests started or ended, or are predicted anew."""
        return state

    @abc.abstractmethod
    def observe(self, state: State, counts: Shaped[Any, "M E"], steps: int = 1) -> State:
        """Take in wishes, resident or not: how many tokens of the next so many steps wanted each expert, in all.

        Arrays of JAX hold them as float32.
        """

    def read(self, state: State, counts: Shaped[Any, "M E"], tokens: int) -> State:
        """Take in the wishes of a chunk of a prompt: so many tokens of one request, read in the step last observed."""
        return self.observe(state, counts, 0)

    @abc.abstractmethod
    def scores(self, state: State) -> Matrix:
        """The present worth of every expert, comparable within a layer.

        Takes many states at once, stacked along leading axes.
        """


def namespace(array: Any) -> ModuleType:
    """`numpy` for its arrays, `jax.numpy` for others."""
    return np if isinstance(array, np.ndarray) else jnp
