"""From an open checkpoint to its experts on the device."""

import dataclasses

import jax
import numpy as np

from emoe_jax.checkpoint import Checkpoint
from emoe_jax.experts.weights import ExpertLayout
from emoe_jax.memory.plan import MemoryPlan
from emoe_jax.residency.knowledge import RoutingKnowledge
from emoe_jax.residency.residency import Residency


def open_residency(
    checkpoint: Checkpoint,
    memory: MemoryPlan,
    policy: str,
    known: RoutingKnowledge,
    link_bandwidth: float | None,
    seed: int = 0,
) -> Residency:
    """Slab, store and loader of a checkpoint, still empty. Raises `ConfigError` for a policy that cannot be had."""
    config = checkpoint.config
    layout = ExpertLayout.of(config, memory.dtype)
    return Residency(
        config,
        layout,
        memory.capacities,
        _CheckpointReader(checkpoint, layout),
        policy,
        rates=known.rates(config),
        knowledge=known.for_policies(),
        link_bandwidth=link_bandwidth,
        host_bytes=memory.host_bytes,
        memory_kind=None if jax.devices()[0].platform == "cpu" else "pinned_host",
        seed=seed,
    )


@dataclasses.dataclass(frozen=True)
class _CheckpointReader:
    """A checkpoint as the expert store's source."""

    checkpoint: Checkpoint
    layout: ExpertLayout

    def read(self, layer: int, expert: int, record: np.ndarray) -> None:
        self.checkpoint.read_expert(layer, expert, record, self.layout)
