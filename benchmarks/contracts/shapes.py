"""Tokens per second of a large model's shapes over a link, from how often steps of a trace or a small model load."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from benchmarks.contracts.steps import Steps
from emoe_jax.config import ModelConfig
from emoe_jax.planning.catalogue import find_model
from emoe_jax.planning.roofline import Roofline
from emoe_jax.planning.targets import Target
from emoe_jax.traces import RoutingTrace

DTYPE = "bfloat16"
CONTEXT = 1024
"""Tokens of each sequence whose keys and values a step reads."""


@dataclasses.dataclass(frozen=True)
class Shapes:
    """A model in bfloat16 on a card whose experts come over a link. Seconds are those of bytes that are moved: a step
    of few rows computes while it reads.
    """

    name: str
    config: ModelConfig
    card: Target
    link: float
    """Bytes per second."""

    @classmethod
    def of(cls, model: str, card: str, link_gbps: float) -> Shapes:
        """By names that `emoe plan` knows. Raises `ConfigError`."""
        name, config = find_model(model)
        return cls(name, config, Target.of_card(card), 1e9 * link_gbps)

    @property
    def roofline(self) -> Roofline:
        return Roofline(self.config, DTYPE, DTYPE, self.config.num_experts)

    @property
    def load_seconds(self) -> float:
        """Of one expert over the link."""
        return self.roofline.record_bytes / self.link

    @property
    def read_seconds(self) -> float:
        """Of one expert in the card's memory."""
        return self.roofline.record_bytes / self.card.bandwidth

    def dense_seconds(self, batch: int) -> float:
        """Of a step of so many sequences, without its experts."""
        work = self.roofline.decode(batch, CONTEXT)
        return (work.dense_bytes + work.kv_bytes) / self.card.bandwidth

    def loads_per_layer_time(self, batch: int) -> float:
        """What one load takes, in units of a layer of a step that loads nothing."""
        layers = len(self.config.moe_layers)
        resident, _ = self.roofline.distinct_experts(batch)
        return self.load_seconds / (self.dense_seconds(batch) / layers + resident * self.read_seconds)

    def step_seconds(
        self, batch: int, loads: Int[np.ndarray, "steps L"], used: Int[np.ndarray, "steps L"]
    ) -> Float[np.ndarray, " steps"]:
        """Of steps that stop at every router, as the engine's do where experts are missed often.

        Loads begin when the router has spoken, one after another on the link. Resident experts are read meanwhile;
        those that were loaded are read when all are there. Nothing of the next layer begins before. The layers of
        `loads` and `used` stand for all layers of the model, in equal parts.

        Worked example, 1 s per load, 0.1 s per expert that is read: a layer that uses 3 experts and loads 1 of them
        takes max(2 * 0.1, 1) + 0.1 = 1.1 s.
        """
        waited = np.maximum((used - loads) * self.read_seconds, loads * self.load_seconds)
        layers = (waited + loads * self.read_seconds).mean(axis=-1) * len(self.config.moe_layers)
        return self.dense_seconds(batch) + layers


def modelled(shapes: Shapes, replayed: Steps, batch: int) -> list[dict[str, Any]]:
    """A row for each tolerance of a replay, of which one must be 0, `exact`; and one without loads, `resident`."""
    exact = replayed.tolerances.index(0.0)

    def speed(loads: Int[np.ndarray, "steps L"], used: Int[np.ndarray, "steps L"]) -> float:
        return batch / float(shapes.step_seconds(batch, loads, used).mean())

    reference = speed(replayed.loads[exact], replayed.used[exact])
    rows = []
    for index, tolerance in enumerate(replayed.tolerances):
        tokens = speed(replayed.loads[index], replayed.used[index])
        rows.append(
            {
                "contract": "bounded" if tolerance else "exact",
                "tolerance": tolerance,
                "batch": batch,
                "loads_per_token_layer": float(replayed.loads[index].mean()) / batch,
                "substituted_weight": float(replayed.given_up[index]),
                "tokens_per_s": tokens,
                "over_exact": tokens / reference,
            }
        )
    used = replayed.used[exact]
    free = speed(np.zeros_like(used), used)
    last = {"contract": "resident", "tolerance": None, "batch": batch, "loads_per_token_layer": 0.0}
    return [*rows, last | {"substituted_weight": None, "tokens_per_s": free, "over_exact": free / reference}]


def first_choices(trace: RoutingTrace, count: int) -> RoutingTrace:
    """A trace whose routers choose no more than so many experts: the best of those that they chose."""
    if count >= trace.top_k:
        return trace
    return dataclasses.replace(trace, experts=trace.experts[:, :, :count], probs=trace.probs[:, :, :count])


def scaled_link_gbps(shapes: Shapes, batch: int, layer_seconds: float, record_bytes: int) -> float:
    """Of a link over which loading an expert of a small model takes as many of its layer times as that of `shapes` does
    over its own link, in gigabytes (1e9 bytes) per second. `layer_seconds` are of a step that loads nothing.
    """
    return record_bytes / (shapes.loads_per_layer_time(batch) * layer_seconds) / 1e9
