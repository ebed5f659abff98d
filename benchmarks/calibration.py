"""What the parts of a step cost on this machine: a fit to steps of engines with short random models.

A model is not run to predict it. Run are models of its widths with random weights and a quarter and half of its layers,
because how fast a CPU multiplies depends on the shapes of the matrices. `Work` counts what their steps do. The costs
are those that come closest to the measured times, in relative terms, and none is negative:

    seconds = sum over counts of (cost * count)

A CPU reads and multiplies in turn, so products have a cost of their own and do not hide behind the reading. What the
host takes for a step is that of a tiny model: an engine prepares a step while the device computes the one before, so
that no decode step takes less.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.decoding import decode_seconds, write_random_checkpoint
from benchmarks.peers import MODEL, PROMPT
from emoe_jax import Engine, SamplingParams
from emoe_jax.config import ModelConfig
from emoe_jax.planning.roofline import Roofline, Work, total_seconds
from emoe_jax.planning.targets import DEVICE_COSTS, Costs, Target

PREFILL = 256
CONTEXT = 320
DECODE = {batch: f"decode, batch {batch}" for batch in (1, 8)}
PROMPT_STEP = f"prompt of {PREFILL}"


SHORT = (4, 2)
"""The layers of a model over those of the models that are run in its place."""

TINY = MODEL | {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_local_experts": 4,
    "num_hidden_layers": 2,
}
"""So small that its steps take what the host takes."""

HIDDEN_BELOW = 1.15
"""A decode step that takes no longer than this times the host's work says nothing of the device."""

PARTS = (*DEVICE_COSTS, "memory_bytes")
"""The counts of `Work` that have a cost."""

_SWEEPS = 20_000


class Sample(NamedTuple):
    """A step that was measured."""

    work: Work
    seconds: float
    """Of the device."""


def calibrated(machine: Target, models: Sequence[Mapping[str, Any]], repetitions: int) -> Target:
    """This machine, with costs and bandwidth as its steps have them in models like these, given by `config.json`."""
    samples = []
    with tempfile.TemporaryDirectory() as folder:

        def run(name: str, raw: Mapping[str, Any]) -> tuple[dict[str, Work], dict[str, float]]:
            path = Path(folder) / name
            write_random_checkpoint(path, dict(raw))
            with engine_of(path) as engine:
                return works_of(engine.config), measured(engine, repetitions)

        host = run("tiny", TINY)[1][DECODE[1]]
        for index, raw in enumerate(models):
            for part in SHORT:
                works, seconds = run(f"{index}-{part}", shortened(raw, part))
                samples += samples_of(works, seconds, host)
    return with_costs(machine, host, fitted(samples))


def shortened(raw: Mapping[str, Any], part: int) -> dict[str, Any]:
    """The `config.json` of a model with the layers of another one over `part`, at least one."""
    return {**raw, "num_hidden_layers": max(1, raw["num_hidden_layers"] // part)}


def samples_of(works: Mapping[str, Work], seconds: Mapping[str, float], host: float) -> list[Sample]:
    """What measured times say of the device. The host's work is hidden by that of a decode step, or hides it; it comes
    before that of a prompt's step."""
    decoded = [Sample(works[what], seconds[what]) for what in DECODE.values() if seconds[what] > HIDDEN_BELOW * host]
    return [*decoded, Sample(works[PROMPT_STEP], max(0.0, seconds[PROMPT_STEP] - host))]


def fitted(samples: Sequence[Sample]) -> dict[str, float]:
    """Seconds for each of `PARTS`: the least squares of relative errors, none of them negative.

    By coordinate descent: each cost in turn takes what the others leave.
    """
    counts = np.array([[getattr(work, part) / seconds for part in PARTS] for work, seconds in samples])
    lengths = np.linalg.norm(counts, axis=0)
    columns = counts / np.where(lengths > 0, lengths, 1.0)
    costs, missing = np.zeros(len(PARTS)), np.ones(len(samples))
    for _ in range(_SWEEPS):
        for part in np.flatnonzero(lengths):
            new = max(0.0, costs[part] + float(columns[:, part] @ missing))
            missing -= (new - costs[part]) * columns[:, part]
            costs[part] = new
    return dict(zip(PARTS, (costs / np.where(lengths > 0, lengths, 1.0)).tolist(), strict=True))


def with_costs(machine: Target, host: float, seconds: Mapping[str, float]) -> Target:
    """A machine whose parts of steps take so long. Products count by their cost alone."""
    per_byte = seconds["memory_bytes"]
    return dataclasses.replace(
        machine,
        bandwidth=1 / per_byte if per_byte else math.inf,
        float32_flops=math.inf,
        costs=Costs(host, **{part: seconds[part] for part in DEVICE_COSTS}),
    )


def works_of(config: ModelConfig) -> dict[str, Work]:
    """What is measured of a model, all experts resident: decode steps by batch, and reading a prompt in one step."""
    roofline = Roofline(config, "float32", "float32", config.num_experts)
    [prompt] = roofline.prefill(PREFILL, PREFILL)
    return {what: roofline.decode(batch, PROMPT) for batch, what in DECODE.items()} | {PROMPT_STEP: prompt}


def predicted(works: Mapping[str, Work], target: Target) -> dict[str, float]:
    """Seconds of each of `works_of`."""
    seconds = {what: work.seconds(target, "float32") for what, work in works.items()}
    return seconds | {PROMPT_STEP: total_seconds([works[PROMPT_STEP]], target, "float32")}


def measured(engine: Engine, repetitions: int) -> dict[str, float]:
    """Seconds of each of `works_of` in an engine: medians."""
    seconds = {}
    for batch, what in DECODE.items():
        decode_seconds(engine, batch, 0)  # warms up
        trials = [decode_seconds(engine, batch, seed) for seed in range(1, repetitions + 1)]
        seconds[what] = statistics.median(trials)
    trials = [prompt_seconds(engine, PREFILL, seed) for seed in range(repetitions + 1)]
    return seconds | {PROMPT_STEP: statistics.median(trials[1:])}


def prompt_seconds(engine: Engine, tokens: int, seed: int) -> float:
    """From a random prompt to its first token."""
    prompt = np.random.default_rng(seed).integers(0, engine.config.vocab_size, tokens).tolist()
    began = time.perf_counter()
    engine.generate([prompt], SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True))
    return time.perf_counter() - began


@contextlib.contextmanager
def engine_of(model: Path) -> Iterator[Engine]:
    """An engine in which nothing moves."""
    with Engine.load(
        model,
        expert_memory="100%",
        routing="resident",
        policy="static",
        predictor="none",
        audit_rate=0.0,
        prefix_caching=False,
        max_model_len=CONTEXT,
        max_num_seqs=max(DECODE),
        max_num_batched_tokens=PREFILL,
    ) as engine:
        yield engine
