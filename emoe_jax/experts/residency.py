"""Which experts are on the device, kept up between steps: slab, table, store, loader and policy as one thing."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from emoe_jax.config import ModelConfig
from emoe_jax.experts.loader import ExpertLoader
from emoe_jax.experts.slab import ExpertSlab
from emoe_jax.experts.store import ExpertReader, ExpertStore
from emoe_jax.experts.table import SlotTable
from emoe_jax.experts.waves import WaveLoader
from emoe_jax.experts.weights import ExpertLayout
from emoe_jax.policies import make_policy

SWAPS_PER_LAYER = 1
"""Experts that the policy may exchange per layer and step."""


class Residency:
    """Owned by whoever owns the step. `commit` before a step, `observe` after it; the rest happens on worker threads.

    A context manager; `close` joins the loader's threads.
    """

    def __init__(
        self,
        config: ModelConfig,
        layout: ExpertLayout,
        capacities: Sequence[int],
        reader: ExpertReader,
        policy: str,
        *,
        host_bytes: int = 0,
        memory_kind: str | None = None,
    ):
        self.policy_name = policy
        self._policy = make_policy(policy, len(config.moe_layers), config.num_experts)
        self.slab = ExpertSlab(layout, capacities)
        self.table = SlotTable(capacities, config.num_experts, sharding=self.slab.sharding)
        self._config = config
        store = ExpertStore(
            reader,
            layout,
            len(config.moe_layers),
            config.num_experts,
            host_bytes,
            memory_kind=memory_kind,
            sharding=self.slab.sharding,
        )
        self._loader = ExpertLoader(store, self.slab, self.table)
        self.waves = WaveLoader(self._loader, self.table, self._eviction_order)
        self._wishes = 0
        self._wishes_resident = 0

    def fill(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Load the policy's initial experts. Raises what the store raises when one cannot be read."""
        self._loader.fill(self._policy.initial(self.table.capacities), progress)

    @property
    def is_full(self) -> bool:
        """Whether every expert of every layer has a slot, so that `resident` and `exact` are the same."""
        return all(capacity == self._config.num_experts for capacity in self.table.capacities)

    @property
    def coverage(self) -> float | None:
        """Share of the routers' wishes that were resident when they arose, since the start; None before the first."""
        return self._wishes_resident / self._wishes if self._wishes else None

    def commit(self) -> None:
        """Bring staged experts into the slab. Never waits."""
        self._loader.commit()

    def observe(self, wish_counts: Int[np.ndarray, "M E"]) -> None:
        """Count the wishes of a step and ask for the experts that the policy now prefers."""
        self._wishes += int(wish_counts.sum())
        self._wishes_resident += int(wish_counts[self.table.resident_mask].sum())
        self._policy.observe(wish_counts)
        for swap in self._policy.swaps(self.table, SWAPS_PER_LAYER, self._loader.in_flight()):
            self._loader.request(swap.layer, swap.load, swap.gain, evict=swap.evict)

    def state(self) -> dict[str, Any]:
        """Residency and loads as JSON-able values."""
        capacities, stats = self.table.capacities, self._loader.stats
        return {
            "policy": self.policy_name,
            "num_experts": self._config.num_experts,
            "top_k": self._config.top_k,
            "moe_layers": list(self._config.moe_layers),
            "slots": list(capacities),
            "share": sum(capacities) / (len(capacities) * self._config.num_experts),
            "experts": [self.table.resident(layer).tolist() for layer in range(len(capacities))],
            "coverage": self.coverage,
            "loads": dataclasses.asdict(stats) | {"bandwidth": stats.bandwidth},
        }

    def close(self) -> None:
        self._loader.close()

    def __enter__(self) -> "Residency":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _eviction_order(self, layer: int) -> Int[np.ndarray, " E"]:
        return np.argsort(self._policy.scores()[layer], kind="stable")
