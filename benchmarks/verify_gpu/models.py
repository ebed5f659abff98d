"""Decoding and prefill of random models of real shapes, by share of resident experts, with and without loads."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import statistics
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.memory.geometries import GEOMETRIES
from benchmarks.verify_gpu.floors import GPT_OSS_20B, decode_bytes
from emoe_jax.config import ModelConfig
from emoe_jax.device.dispatcher import Dispatcher
from emoe_jax.device.kv_cache import new_cache
from emoe_jax.device.runner import Runner
from emoe_jax.device.shapes import Buckets
from emoe_jax.experts.record_format import RecordFormat
from emoe_jax.models import config_from_hf
from emoe_jax.models.decoder import Decoder
from emoe_jax.policies.rule import ExpectedWishes
from emoe_jax.requests.request import SamplingParams
from emoe_jax.requests.sequence import Sequence
from emoe_jax.residency.residency import Residency
from emoe_jax.scheduling.pages import PAGE_SIZE, PagePool, pages_for
from emoe_jax.scheduling.scheduler import Scheduler

SHARES = (1.0, 0.6, 0.4, 0.2)
CONTEXT = 512
_STEPS = 12  # that are timed
_ROOM = 0.85
"""Of the device's memory, for weights, slab and KV cache of one model."""


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is measured of a model."""

    name: str
    config: ModelConfig
    dtype: str
    batches: tuple[int, ...]
    prompt: int


def workloads(dry: bool) -> tuple[Workload, ...]:
    """Of the models that the floors are given for; tiny ones where there is no GPU."""
    if dry:
        tiny = GEOMETRIES["mixtral-8x7b"] | {
            "vocab_size": 97,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        }
        return (Workload("tiny", config_from_hf(tiny), "float32", (2,), 40),)
    return (
        Workload("mixtral-8x7b", config_from_hf(GEOMETRIES["mixtral-8x7b"]), "bfloat16", (1, 8, 32), CONTEXT),
        Workload("gpt-oss-20b", config_from_hf(GPT_OSS_20B), "bfloat16", (1, 8, 32), CONTEXT),
    )


class _RandomExperts:
    """Reads any expert from one buffer of random numbers, as fast as memory copies."""

    def __init__(self, record_format: RecordFormat, inputs: int):
        numbers = np.random.default_rng(0).standard_normal(record_format.size, np.float32) * inputs**-0.5
        self._record = numbers.astype(record_format.dtype)

    def read_expert(self, layer: int, expert: int, record: np.ndarray, record_format: RecordFormat, /) -> None:
        record[:] = self._record


def with_layers_that_fit(config: ModelConfig, dtype: str, device_bytes: int) -> ModelConfig:
    """The model with as many layers as the device has room for with every expert resident."""
    itemsize = jnp.dtype(dtype).itemsize
    attention = config.hidden_size * config.head_dim * (2 * config.num_heads + 2 * config.num_kv_heads)
    layer = itemsize * (attention + config.num_experts * (config.expert_params + config.hidden_size))
    ends = 2 * config.vocab_size * config.hidden_size * itemsize
    layers = max(1, min(config.num_layers, int((_ROOM * device_bytes - ends) // layer)))
    windows = config.sliding_windows[:layers]
    return config.replace(num_layers=layers, moe_layers=tuple(range(layers)), sliding_windows=windows)


def random_weights(config: ModelConfig, dtype: str) -> Decoder:
    """A decoder with random weights, made on the device."""
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    leaves, tree = jax.tree.flatten(nnx.state(model))
    filled = []
    for index, leaf in enumerate(leaves):
        numbers = jax.random.normal(jax.random.key(index), leaf.shape, dtype)
        filled.append(numbers * leaf.shape[-1] ** -0.5 if len(leaf.shape) > 1 else jnp.ones(leaf.shape, dtype))
    nnx.update(model, jax.tree.unflatten(tree, filled))
    return model


class Bench:
    """A runner of a random model with so many experts resident, and a scheduler that feeds it."""

    def __init__(self, load: Workload, config: ModelConfig, share: float, loads: bool):
        """With `loads` every layer is asked for an absent expert all the time."""
        self.config, record_format = config, RecordFormat.of(config, load.dtype)
        slots = min(config.num_experts, max(config.top_k, round(share * config.num_experts)))
        self.residency = Residency(
            config,
            record_format,
            [slots] * len(config.moe_layers),
            _RandomExperts(record_format, config.hidden_size),
            "emoe-no-refresh",
            memory_kind=None if jax.default_backend() == "cpu" else "pinned_host",
            host_bytes=4 * record_format.nbytes,
        )
        self.residency.fill()
        sequences, length = max(load.batches), load.prompt + 4 * _STEPS + 16
        pages = sequences * pages_for(length) + 1
        chunk = min(512, load.prompt)
        self.scheduler = Scheduler(PagePool(pages, PAGE_SIZE), sequences, chunk + sequences, length, chunk)
        buckets = Buckets.of(sequences, chunk + sequences, length)
        cache = new_cache(config, pages, load.dtype)
        runner = Runner(random_weights(config, load.dtype), self.residency, cache, buckets)
        self.dispatcher = Dispatcher(runner, self.residency)
        self._in_flight = self.dispatcher.in_flight
        self._requests = 0
        self._loads = loads

    def add(self, length: int, tokens: int) -> Sequence:
        """A prompt of random tokens, and how many are to be generated."""
        rng = np.random.default_rng(self._requests)
        prompt = rng.integers(0, self.config.vocab_size, length).tolist()
        params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        sequence = Sequence(f"{self._requests}", prompt, params)
        self._requests += 1
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> None:
        """Dispatch a step, then read the one before, as the engine does."""
        self.residency.commit()
        if self._loads and not self.residency.is_full:
            self._ask_for_others()
        plan = self.scheduler.schedule(time.monotonic())
        if plan:
            self.dispatcher.dispatch(plan)
            self.scheduler.dispatched(plan)
        if len(self._in_flight) > 1 or not plan:
            dispatched = self._in_flight.popleft()
            result = self.dispatcher.collect(dispatched)
            self.scheduler.update(dispatched.plan, result)
            self.residency.observe(*result.wishes)

    def _ask_for_others(self) -> None:
        """Prefer, in each layer, the first absent expert behind a resident one."""
        mask = self.residency.table.resident_mask
        rates = mask.astype(np.float32)
        following = mask & ~np.roll(mask, -1, axis=1)
        layers, experts = np.nonzero(following)
        first = np.unique(layers, return_index=True)[1]
        rates[layers[first], (experts[first] + 1) % mask.shape[1]] = 2.0
        self.residency.plan(ExpectedWishes(rates, rates, 0.0))

    def drain(self) -> None:
        """Until nothing is left to do."""
        while self.scheduler.has_work or self._in_flight:
            self.step()

    def close(self) -> None:
        """End its threads. What it has on the device goes with the bench itself."""
        self.residency.close()


def decode_seconds(bench: Bench, batch: int, prompt: int) -> tuple[float, int, int]:
    """Median seconds of a decode step; loads during the timed steps, and waits for results."""
    sequences = [bench.add(prompt, 3 * _STEPS + 8) for _ in range(batch)]
    while not all(sequence.num_sampled > 3 for sequence in sequences):
        bench.step()
    before, taken = bench.residency.loads.loads, []
    with mock.patch.object(jax, "device_get", wraps=jax.device_get) as waiting:
        for _ in range(_STEPS):
            began = time.perf_counter()
            bench.step()
            taken.append(time.perf_counter() - began)
    loads = bench.residency.loads.loads - before
    for sequence in sequences:
        bench.scheduler.abort(sequence.request_id)
    bench.drain()
    return statistics.median(taken), loads, waiting.call_count


def prefill_seconds(bench: Bench, prompt: int) -> float:
    """Median seconds from a prompt to its first token."""
    taken = []
    for index in range(5):
        bench.add(prompt, 1)
        began = time.perf_counter()
        bench.drain()
        if index:
            taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def measure(
    load: Workload, device_bytes: int, bandwidth: float, link: float, shares: tuple[float, ...]
) -> Iterator[dict[str, Any]]:
    """A row per share without loads, and one with a load for every layer at all times.

    `loading_ms_per_step` is what the loads of a step would take by themselves over the link of `link` bytes per second:
    where steps with loads take less than that longer than steps without, loads run beside the steps.
    """
    config = with_layers_that_fit(load.config, load.dtype, device_bytes)
    for share in shares:
        for loads_run in (False,) if share == 1 else (False, True):
            row = _setting(load, config, share, loads_run, bandwidth, link)
            gc.collect()  # one model's weights and experts fill a device
            yield row


def _setting(
    load: Workload, config: ModelConfig, share: float, loads_run: bool, bandwidth: float, link: float
) -> dict[str, Any]:
    """One row. Steps are compiled as they are met: an engine would compile them all beforehand."""
    began = time.perf_counter()
    with contextlib.closing(Bench(load, config, share, loads_run)) as bench:
        row: dict[str, Any] = {
            "model": load.name,
            "layers": config.num_layers,
            "share": share,
            "loads_run": loads_run,
            "start_seconds": time.perf_counter() - began,
            "prefill_tokens_per_s": load.prompt / prefill_seconds(bench, load.prompt),
        }
        for batch in load.batches:
            taken, loads, waits = decode_seconds(bench, batch, load.prompt)
            slots = bench.residency.table.capacities[0]
            floor = decode_bytes(config, batch, load.prompt, load.dtype, slots) / bandwidth
            row[f"decode_b{batch}"] = {
                "step_ms": 1e3 * taken,
                "tokens_per_s": batch / taken,
                "floor_ms": 1e3 * floor,
                "of_floor": floor / taken,
                "loads_per_step": loads / _STEPS,
                "loading_ms_per_step": 1e3 * loads / _STEPS * bench.residency.expert_bytes / link,
                "waits_per_step": waits / _STEPS,
            }
        return row
