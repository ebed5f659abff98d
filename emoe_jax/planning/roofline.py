"""The least that a step can take: the bytes that it reads and the products that it computes, over a device's rates.

A step of `rows` tokens reads the dense weights once, each expert that a row chooses once, and the keys and values that
its rows see. Its products are two operations per weight and row. The larger of the two times counts, because a device
reads while it computes. Experts that are absent come over the link first, and the step waits for them:

    device = max(read bytes / bandwidth, operations / flops) + loaded bytes / link + costs
    seconds = max(device, host)

The costs are what the device takes beside that, and `host` is what the engine takes to prepare a step while the device
computes the one before. Both are 0 unless they were measured (`Costs`).

How many different experts `rows` tokens choose in a layer is the mean over tokens that choose independently. Of the
`k` choices of a token, the share `coverage` falls evenly on the `C` experts with a slot, the rest evenly on the
`E - C` others:

    resident = C * (1 - (1 - k * coverage / C) ** rows)
    absent   = (E - C) * (1 - (1 - k * (1 - coverage) / (E - C)) ** rows)

An absent expert is loaded, written to its slot and read. With more coverage no step takes longer.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax.numpy as jnp

from emoe_jax.config import ModelConfig
from emoe_jax.experts.record_format import RecordFormat
from emoe_jax.memory.plan import dense_parameters
from emoe_jax.moe import multiplies_alone
from emoe_jax.planning.targets import DEVICE_COSTS, Target


@dataclasses.dataclass(frozen=True)
class Work:
    """What one step, or several together, read of the device's memory, load over its link, and compute."""

    dense_bytes: float = 0.0
    expert_bytes: float = 0.0
    """Of experts in the device's memory: read, and for those that are loaded also written."""
    kv_bytes: float = 0.0
    link_bytes: float = 0.0
    operations: float = 0.0
    layers: float = 0.0
    rows: float = 0.0
    """In each layer: a token that passes four layers is four rows."""
    choices: float = 0.0
    """Of an expert by a row."""
    repeated_bytes: float = 0.0
    """Of experts that a row reads after another one has, where each row multiplies for itself."""
    packed_bytes: float = 0.0
    """Of weights that several rows multiply together."""

    @property
    def memory_bytes(self) -> float:
        """All that the device's memory gives or takes."""
        return self.dense_bytes + self.expert_bytes + self.kv_bytes

    def seconds(self, target: Target, dtype: str) -> float:
        """On a device, computing in this dtype; of one step among others."""
        return max(self.device_seconds(target, dtype), target.costs.host)

    def device_seconds(self, target: Target, dtype: str) -> float:
        """What the device is busy for."""
        busy = max(self.memory_bytes / target.bandwidth, self.operations / target.flops(dtype))
        return busy + self.link_bytes / target.link + math.fsum(self.costs(target).values())

    def costs(self, target: Target) -> dict[str, float]:
        """Seconds of the device beside reading, computing and loading, by what they are for."""
        return {part: getattr(target.costs, part) * getattr(self, part) for part in DEVICE_COSTS}

    def bound(self, target: Target, dtype: str) -> str:
        """What takes most of a step's time: `memory`, `products`, `link` or `overhead`."""
        parts = {
            "memory": self.memory_bytes / target.bandwidth,
            "products": self.operations / target.flops(dtype),
            "link": self.link_bytes / target.link,
            "overhead": max(math.fsum(self.costs(target).values()), target.costs.host),
        }
        return max(parts, key=parts.__getitem__)


@dataclasses.dataclass(frozen=True)
class Roofline:
    """A model, in a dtype and with experts in a format, of which some have slots."""

    config: ModelConfig
    dtype: str
    """Of weights and KV cache, and of what is computed."""
    expert_format: str
    slots: float
    """Per MoE layer, on average."""

    @functools.cached_property
    def record_bytes(self) -> int:
        """Of one expert."""
        return RecordFormat.of(self.config, self.expert_format).nbytes

    def coverage(self, wanted: float | None) -> float:
        """What counts of a coverage that was asked for: it is at least what experts at random would cover."""
        return max(self.slots / self.config.num_experts, wanted or 0.0)

    def decode(self, batch: int, context: int, coverage: float | None = None) -> Work:
        """One token of each of `batch` sequences that have `context` tokens, itself included."""
        seen = batch * self._seen(context)
        return self._work(batch, batch, seen, seen, coverage)

    def prefill(self, tokens: int, chunk: int, coverage: float | None = None) -> list[Work]:
        """A prompt alone, in steps of at most `chunk` tokens."""
        steps = []
        for first in range(0, tokens, chunk):
            rows = min(chunk, tokens - first)
            pairs = rows * (self._seen(first + 1) + self._seen(first + rows)) / 2
            steps.append(self._work(rows, 1, self._seen(first + rows), pairs, coverage))
        return steps

    def _work(self, rows: int, sampled: int, seen: float, pairs: float, coverage: float | None) -> Work:
        """`rows` tokens, of which `sampled` get logits. Summed over layers, so many keys are `seen`, each read once,
        by so many `pairs` of a query and a key.
        """
        config, itemsize = self.config, jnp.dtype(self.dtype).itemsize
        resident, absent = self.distinct_experts(rows, coverage)
        layers, head = len(config.moe_layers), config.vocab_size * config.hidden_size
        dense, experts = read_parameters(config), layers * config.top_k * config.expert_params
        products = rows * (dense - head + experts) + sampled * head
        attention = config.num_heads * (config.head_dim + config.value_head_dim) * pairs  # scores, and what they weigh
        choices, visited = layers * rows * config.top_k, layers * (resident + absent) * self.record_bytes
        alone = multiplies_alone(config, rows * config.top_k)
        return Work(
            dense_bytes=itemsize * dense,
            expert_bytes=layers * (resident + 2 * absent) * self.record_bytes,
            kv_bytes=seen * config.kept_numbers * itemsize,
            link_bytes=layers * absent * self.record_bytes,
            operations=2 * (products + attention),
            layers=config.num_layers,
            rows=rows * config.num_layers,
            choices=choices,
            repeated_bytes=choices * self.record_bytes - visited if alone else 0.0,
            packed_bytes=(itemsize * dense if rows > 1 else 0.0) + (0.0 if alone else visited),
        )

    def distinct_experts(self, rows: int, coverage: float | None = None) -> tuple[float, float]:
        """Mean number of different experts that `rows` tokens choose in a layer: resident ones, and absent ones."""
        experts, k, slots = self.config.num_experts, self.config.top_k, self.slots
        covered = self.coverage(coverage)
        resident = _distinct(slots, k * covered, rows)
        return resident, 0.0 if slots >= experts else _distinct(experts - slots, k * (1 - covered), rows)

    def _seen(self, context: int) -> float:
        """Keys that a token sees, its own included, summed over layers: no more than a layer's window."""
        config = self.config
        return sum(min(context, config.sliding_window(layer) or context) for layer in range(config.num_layers))


@functools.cache
def read_parameters(config: ModelConfig) -> int:
    """Numbers in the weights without experts that a step reads: of a table of embeddings it reads a few rows only."""
    table = 0 if config.tie_embeddings else config.vocab_size * config.hidden_size
    return dense_parameters(config) - table


def total_seconds(steps: Sequence[Work], target: Target, dtype: str) -> float:
    """Of steps one after the other. Nothing hides what the host takes before the first one."""
    return target.costs.host + math.fsum(step.seconds(target, dtype) for step in steps)


def _distinct(experts: float, choices: float, rows: int) -> float:
    """Of so many experts, those that are chosen when each row makes `choices` of them, alike."""
    return experts * (1 - (1 - min(1.0, choices / experts)) ** rows)
