"""Which experts should be resident: from what the router wished, which to load and which to let go for them."""

import abc
import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from emoe_jax.errors import ConfigError
from emoe_jax.experts.table import SlotTable


@dataclasses.dataclass(frozen=True)
class Swap:
    """Load one expert of a layer in place of another; `gain` orders swaps of all layers, largest first."""

    layer: int
    load: int
    evict: int
    gain: float


class ResidencyPolicy(abc.ABC):
    """Experts have scores; the highest-scoring ones of a layer should be resident.

    A subclass says what the scores are. `margin` is by how much an absent expert must be ahead of the resident one it
    replaces, so that near ties do not make experts take turns.
    """

    margin: float = 0.0

    def __init__(self, num_layers: int, num_experts: int, frequencies: Float[np.ndarray, "M E"] | None = None):
        """`frequencies`, where known, decide what is resident before anything was observed."""
        if frequencies is not None and np.shape(frequencies) != (num_layers, num_experts):
            raise ConfigError(
                f"expert frequencies have shape {list(np.shape(frequencies))}; the model has "
                f"{num_layers} MoE layers of {num_experts} experts"
            )
        self.num_layers = num_layers
        self.num_experts = num_experts
        self.frequencies = np.zeros((num_layers, num_experts)) if frequencies is None else np.asarray(frequencies)

    def initial(self, capacities: Sequence[int]) -> list[Int[np.ndarray, " C"]]:
        """Experts to start with per layer, ascending: the most frequent, or the first, which is what ties give."""
        order = np.argsort(-self.frequencies, axis=1, kind="stable")
        return [np.sort(order[layer, :capacity]) for layer, capacity in enumerate(capacities)]

    @abc.abstractmethod
    def observe(self, counts: Int[np.ndarray, "M E"]) -> None:
        """Take in the wishes of one step: how many tokens wanted each expert, resident or not."""

    @abc.abstractmethod
    def scores(self) -> Float[np.ndarray, "M E"]:
        """The present worth of every expert, comparable within a layer."""

    def swaps(
        self, table: SlotTable, limit_per_layer: int = 1, busy: Bool[np.ndarray, "M E"] | None = None
    ) -> list[Swap]:
        """At most `limit_per_layer` exchanges per layer, the most gainful first. Changes nothing.

        Experts in `busy` (on their way in or out already, `ExpertLoader.in_flight`) are left alone.
        """
        scores = self.scores()
        resident = table.resident_mask
        loadable, evictable = ~resident, resident
        if busy is not None:
            loadable, evictable = loadable & ~busy, evictable & ~busy
        limit = min(limit_per_layer, self.num_experts)
        best = _largest(np.where(loadable, scores, -np.inf), limit)  # [M, n]
        worst = _largest(np.where(evictable, -scores, -np.inf), limit)
        gained = np.take_along_axis(np.where(loadable, scores, -np.inf), best, axis=1)
        lost = np.take_along_axis(np.where(evictable, scores, np.inf), worst, axis=1)
        gain = gained - lost  # [M, n]; -inf where there is nothing to load or nothing to evict
        layers, ranks = np.nonzero(gain > self.margin)
        order = np.argsort(-gain[layers, ranks], kind="stable")
        return [
            Swap(int(layer), int(best[layer, rank]), int(worst[layer, rank]), float(gain[layer, rank]))
            for layer, rank in zip(layers[order], ranks[order], strict=True)
        ]


class StaticPolicy(ResidencyPolicy):
    """The initial set for ever: the most frequent experts, or the first of each layer."""

    def observe(self, counts: Int[np.ndarray, "M E"]) -> None:
        pass

    def scores(self) -> Float[np.ndarray, "M E"]:
        return self.frequencies

    def swaps(
        self, table: SlotTable, limit_per_layer: int = 1, busy: Bool[np.ndarray, "M E"] | None = None
    ) -> list[Swap]:
        return []


class LruPolicy(ResidencyPolicy):
    """An expert that is wished for but absent replaces the resident one that was not wished for longest."""

    # Scores of experts wished for in the same step differ by less, so they never replace each other.
    margin = 0.5

    def __init__(self, num_layers: int, num_experts: int, frequencies: Float[np.ndarray, "M E"] | None = None):
        super().__init__(num_layers, num_experts, frequencies)
        self._step = 0
        self._scores = np.zeros((num_layers, num_experts))

    def observe(self, counts: Int[np.ndarray, "M E"]) -> None:
        self._step += 1
        # Number of the step, plus a share of the wishes in it: among equally recent ones the more wished-for is first.
        recent = self._step + 0.5 * counts / max(1, counts.sum(axis=1).max(initial=0))
        np.copyto(self._scores, recent, where=counts > 0)

    def scores(self) -> Float[np.ndarray, "M E"]:
        return self._scores


POLICIES: dict[str, type[ResidencyPolicy]] = {"static": StaticPolicy, "lru": LruPolicy}


def make_policy(
    name: str, num_layers: int, num_experts: int, frequencies: Float[np.ndarray, "M E"] | None = None
) -> ResidencyPolicy:
    """A policy by its name on the command line. Raises `ConfigError` with the names there are."""
    if name not in POLICIES:
        raise ConfigError(f"unknown residency policy {name!r}; expected one of {', '.join(sorted(POLICIES))}")
    return POLICIES[name](num_layers, num_experts, frequencies)


def _largest(values: Float[np.ndarray, "M E"], n: int) -> Int[np.ndarray, "M n"]:
    """Indices of the `n` largest values of each row, largest first."""
    if n == 1:
        return values.argmax(axis=1)[:, None]
    return np.argsort(-values, axis=1, kind="stable")[:, :n]
