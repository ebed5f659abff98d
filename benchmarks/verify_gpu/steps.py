"""The step functions on the device against the same functions on the CPU, logit for logit."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from benchmarks.verify_gpu.models import Workload, random_weights, workloads
from emoe_jax.config import ModelConfig
from emoe_jax.device.batch import Batch, batches_of
from emoe_jax.device.block_tables import SentTables
from emoe_jax.device.kv_cache import new_cache
from emoe_jax.device.report import Report
from emoe_jax.device.shapes import Buckets
from emoe_jax.device.step import Skeleton, whole_step
from emoe_jax.experts.weights import ExpertWeights
from emoe_jax.models.decoder import init_experts
from emoe_jax.platforms import default_platform
from emoe_jax.requests.sequence import Sequence
from emoe_jax.scheduling.pages import pages_for
from emoe_jax.scheduling.plan import PrefillChunk, StepPlan

TOLERANCE = 2e-4
"""Of a logit in float32, as a share of the largest one."""
_ROUNDS = 4


def check_steps(platform: str | None = None) -> dict[str, Any]:
    """Prompts and then decoding rows beside a prompt, in float32, with half of the experts resident.

    Both sides follow the tokens that the CPU chooses.
    """
    load = workloads(dry=True)[0]
    config = load.config.replace(hidden_size=64, expert_hidden=96)
    error, tokens = 0.0, []
    with jax.default_device(jax.devices("cpu")[0]):
        weights = _weights(config, load)
        there = _Side(config, weights, "cpu")
    here = _Side(config, weights, platform or default_platform())
    for batch in _batches(config):
        wanted, chosen = there.run(batch)
        got, also = here.run(batch)
        error = max(error, float(np.max(np.abs(got - wanted)) / np.max(np.abs(wanted))))
        tokens.append(bool((chosen == also).all()))
    return {
        "case": "step of a tiny Mixtral against the CPU",
        "error": error,
        "same_tokens": all(tokens),
        "passes": error <= TOLERANCE and all(tokens),
    }


class _Side:
    def __init__(self, config: ModelConfig, weights: tuple[Any, ...], platform: str):
        self._device = jax.devices("cpu")[0] if platform == "cpu" else jax.devices()[0]
        self._skeleton, leaves, experts, slots = weights
        self._weights = jax.device_put((leaves, experts, slots), self._device)
        self._cache = jax.device_put(new_cache(config, 64, "float32"), self._device)
        self._last = jax.device_put(np.zeros(8, np.int32), self._device)
        self._config, self._platform = config, platform

    def run(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        words = jax.device_put(batch.words, self._device)
        leaves, experts, slots = self._weights
        self._cache, out = whole_step(
            *(leaves, experts, slots, self._cache, words, self._last),
            skeleton=self._skeleton,
            config=self._config,
            shape=batch.shape,
            platform=self._platform,
        )
        count = len(batch.pieces)
        report = Report.read(np.asarray(out.report), batch.shape, self._config)
        return np.asarray(out.logits)[:count], np.asarray(report.tokens)[:count]


def _weights(config: ModelConfig, load: Workload) -> tuple[Any, ...]:
    skeleton, leaves = Skeleton.split(random_weights(config, load.dtype))
    half = config.num_experts // 2
    experts = tuple(
        ExpertWeights(10 * layer.w_in[:half], 10 * layer.w_out[:half])
        for layer in init_experts(config, jax.random.key(3))
    )
    rng = np.random.default_rng(0)
    slots = np.stack([np.minimum(rng.permutation(config.num_experts), half) for _ in experts]).astype(np.int32)
    return skeleton, leaves, experts, slots


def _batches(config: ModelConfig) -> list[Batch]:
    """Two prompts together; then both decode beside a third one; then all three decode."""
    rng = np.random.default_rng(1)
    buckets, tables = Buckets.of(4, 64, 256), SentTables(pages_for(256))
    sequences = [
        Sequence(str(index), rng.integers(0, config.vocab_size, length).tolist())
        for index, length in enumerate((37, 20, 70))
    ]
    page = 1
    for sequence in sequences:
        count = pages_for(len(sequence.prompt_token_ids) + _ROUNDS)
        sequence.pages = list(range(page, page + count))
        page += count

    def chunk(sequence: Sequence, start: int, stop: int) -> PrefillChunk:
        return PrefillChunk(sequence, start, stop - start, stop == len(sequence.prompt_token_ids))

    def decode(sequence: Sequence) -> Sequence:
        sequence.generated.append(int(rng.integers(config.vocab_size)))
        sequence.num_computed = sequence.num_known - 1
        return sequence

    first, second, third = sequences
    plans = [lambda: StepPlan((), (chunk(first, 0, 37), chunk(second, 0, 20)))]
    plans.append(lambda: StepPlan((decode(first), decode(second)), (chunk(third, 0, 50),)))
    plans.append(lambda: StepPlan((decode(first), decode(second)), (chunk(third, 50, 70),)))
    plans += [lambda: StepPlan(tuple(decode(each) for each in sequences))] * _ROUNDS
    return [batch for plan in plans for batch in batches_of(plan(), buckets, tables)]
