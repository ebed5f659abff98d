"""`ResidencyPolicy`: a rule and its state, kept up step by step, and which experts to exchange by it."""

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from emoe_jax.errors import ConfigError
from emoe_jax.policies.rule import ExpectedWishes, Rule
from emoe_jax.traces.coverage import best_experts


class Swap(NamedTuple):
    """Load one expert of a layer in place of another; `gain` orders swaps of all layers, largest first."""

    layer: int
    load: int
    evict: int
    gain: float


class ChunkWishes(NamedTuple):
    """Wishes of a part of a prompt that was read in one step, and how many tokens it has."""

    counts: Int[np.ndarray, "M E"]
    tokens: int


class ResidencyPolicy:
    """What the engine asks between steps. An answer for 24 layers of 32 experts takes 0.03 to 0.15 ms, by the rule."""

    def __init__(
        self,
        rule: Rule[Any],
        num_layers: int,
        num_experts: int,
        rates: Float[np.ndarray, "M E"] | None = None,
    ):
        """`rates` (see `ExpectedWishes`), where known, decide what is resident before anything was observed."""
        self.num_layers = num_layers
        self.num_experts = num_experts
        self._shape = (num_layers, num_experts)
        self._rates = np.zeros(self._shape, np.float32) if rates is None else self._checked(rates)
        self.rule = rule
        self.state = rule.start(self._rates)
        self._scores: Float[np.ndarray, "M E"] | None = None
        self._wishes: Float[np.ndarray, "M E"] = np.zeros(self._shape, np.float32)
        self._steps = 0  # whose wishes these are; the rule has not taken them in yet
        self.sensitivity = np.ones(num_layers, np.float32)
        self.layers_spared = 0
        """How often `swaps` left a layer alone in which an exchange was due, because no request is sensitive to it."""

    def initial(self, capacities: Sequence[int]) -> list[Int[np.ndarray, " C"]]:
        """Experts to start with per layer, ascending: those of the highest rates, or the first, which ties give."""
        return [np.flatnonzero(best) for best in best_experts(self._rates, capacities)]

    def plan(self, expected: ExpectedWishes) -> None:
        """Requests started or ended, or are predicted anew.

        Gains of a layer count by its `sensitivity`. Nothing is exchanged in a layer where that is 0.
        """
        rates, joined = self._checked(expected.rates), self._checked(expected.joined)
        self._take_in()
        self.state = self.rule.plan(self.state, ExpectedWishes(rates, joined, float(expected.continuing)))
        self._scores = None
        if expected.sensitivity is not None:
            self.sensitivity = np.asarray(expected.sensitivity, np.float32)

    def observe(self, counts: Int[np.ndarray, "M E"], chunks: Sequence[ChunkWishes] = ()) -> None:
        """Wishes of one step, resident or not: how many tokens wanted each expert, but for those of `chunks`, each of
        which is of one prompt. Single tokens are only added up: the rule takes them in when scores are asked for.
        """
        self._wishes += counts
        self._steps += 1
        if chunks:
            self._take_in()
            for chunk in chunks:
                self.state = self.rule.read(self.state, *chunk)

    def scores(self) -> Float[np.ndarray, "M E"]:
        """The present worth of every expert, comparable within a layer."""
        self._take_in()
        scores = self.rule.scores(self.state) if self._scores is None else self._scores
        self._scores = scores
        return scores

    def swaps(
        self, resident: Bool[np.ndarray, "M E"], limit_per_layer: int = 1, busy: Bool[np.ndarray, "M E"] | None = None
    ) -> list[Swap]:
        """At most `limit_per_layer` exchanges per layer, the most gainful first. Changes no state but `layers_spared`.

        Experts in `busy` (on their way in or out already, `ExpertLoader.in_flight`) are left alone.
        """
        scores, evictable = self.scores(), resident
        loadable = ~evictable
        if busy is not None:
            loadable, evictable = loadable & ~busy, evictable & ~busy
        gained, lost = np.where(loadable, scores, -np.inf), np.where(evictable, scores, np.inf)
        margin = self.rule.margin + self.rule.share_margin * resident.mean(1)
        is_due = gained.max(1) - lost.min(1) > margin
        self.layers_spared += int(is_due[self.sensitivity == 0].sum())
        is_due &= self.sensitivity > 0
        layers = np.flatnonzero(is_due)[:, None]
        if not len(layers):
            return []
        load = np.argsort(-gained[layers[:, 0]], axis=1, kind="stable")[:, :limit_per_layer]
        evict = np.argsort(lost[layers[:, 0]], axis=1, kind="stable")[:, :limit_per_layer]
        gain = gained[layers, load] - lost[layers, evict]
        row, nth = np.nonzero(gain > margin[layers])  # the best for the worst, the second best for the second worst
        layer, gain = layers[row, 0], gain[row, nth] * self.sensitivity[layers[row, 0]]
        swaps = map(Swap, layer.tolist(), load[row, nth].tolist(), evict[row, nth].tolist(), gain.tolist())
        return sorted(swaps, key=operator.attrgetter("gain"), reverse=True)

    def _take_in(self) -> None:
        if self._steps:
            self.state = self.rule.observe(self.state, self._wishes, self._steps)
            self._scores = None
            self._wishes, self._steps = np.zeros(self._shape, np.float32), 0

    def _checked(self, rates: Float[np.ndarray, "M E"]) -> Float[np.ndarray, "M E"]:
        if np.shape(rates) != self._shape:
            raise ConfigError(
                f"expert frequencies have shape {list(np.shape(rates))}; the model has "
                f"{self.num_layers} MoE layers of {self.num_experts} experts"
            )
        return np.asarray(rates, np.float32)
