"""The planner's prediction against this machine: `python -m benchmarks.planning --json FILE`, or `emoe plan --check`.

The machine's rates are measured first: reading memory, products, and what a step takes beside both, from two tiny
models of different depth. From them the planner predicts decode steps and the reading of a prompt. Then engines do
these, all experts resident: the demo, and the random Mixtral of `benchmarks.peers` with 430 M float32 parameters.

JSON: `{"rates": {...}, "rows": [{"model", "what", "predicted_ms", "measured_ms", "ratio"}, ...]}`. The ratio is that of
the predicted time to the measured one.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.arguments import count
from benchmarks.decoding import decode_seconds, write_random_checkpoint
from benchmarks.peers import MODEL, PROMPT
from benchmarks.results import write_json
from emoe_jax import EmoeError, Engine, SamplingParams
from emoe_jax.amounts import format_number
from emoe_jax.config import ModelConfig
from emoe_jax.demo import demo_model
from emoe_jax.errors import one_line
from emoe_jax.memory.plan import usable_memory
from emoe_jax.planning.rates import this_machine
from emoe_jax.planning.roofline import Roofline, total_seconds
from emoe_jax.planning.targets import Target

BATCHES = (1, 8)
PREFILL = 256
CONTEXT = 320
REPETITIONS = 5
DEPTHS = (2, 6)
"""Layers of the tiny models that tell what a step takes beside reading and computing."""

TINY = MODEL | {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_local_experts": 4,
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.planning", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")
    parser.add_argument(
        "--repetitions", type=count, default=REPETITIONS, metavar="N", help="of each measurement (default 5)"
    )
    options = parser.parse_args(argv)
    try:
        numbers = check(options.repetitions)
        show(numbers, Console())
        write_json(numbers, options.json)
    except (EmoeError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


def check(repetitions: int) -> dict[str, Any]:
    """The machine's rates, and a row for each time that is predicted and measured."""
    machine = this_machine(usable_memory())
    with tempfile.TemporaryDirectory() as folder:
        few, many = (_tiny_step(Path(folder), machine, depth, repetitions) for depth in DEPTHS)
        fixed, per_layer = overhead(few, many)
        random = Path(folder) / "random"
        write_random_checkpoint(random, MODEL)
        rows = []
        for name, path in (("demo", demo_model()), ("430 M", random)):
            with engine_of(path) as engine:
                target = with_overhead(machine, engine.config, fixed, per_layer)
                rows += compared(name, predicted(engine.config, target), measured(engine, repetitions))
    rates = {
        "memory_gbps": machine.bandwidth / 1e9,
        "gflops": machine.float32_flops / 1e9,
        "step_ms": 1e3 * fixed,
        "layer_ms": 1e3 * per_layer,
    }
    return {"rates": rates, "rows": rows}


def overhead(few: float, many: float) -> tuple[float, float]:
    """Seconds of a step, and of each of its layers, beside reading and computing: from what steps of models of `DEPTHS`
    layers take beside that. Neither is less than nothing.

    Worked example, for 2 and 6 layers: 1.0 ms and 2.0 ms are 0.25 ms per layer and 0.5 ms per step.
    """
    per_layer = max(0.0, (many - few) / (DEPTHS[1] - DEPTHS[0]))
    return max(0.0, few - DEPTHS[0] * per_layer), per_layer


def with_overhead(machine: Target, config: ModelConfig, fixed: float, per_layer: float) -> Target:
    """The machine as steps of this model find it."""
    return dataclasses.replace(machine, step_seconds=fixed + config.num_layers * per_layer)


def predicted(config: ModelConfig, target: Target) -> dict[str, float]:
    """Seconds of a decode step by batch, and of reading a prompt, with all experts resident."""
    roofline = Roofline(config, "float32", "float32", config.num_experts)
    steps = {f"decode, batch {batch}": roofline.decode(batch, PROMPT) for batch in BATCHES}
    seconds = {what: work.seconds(target, "float32") for what, work in steps.items()}
    return seconds | {f"prompt of {PREFILL}": total_seconds(roofline.prefill(PREFILL, PREFILL), target, "float32")}


def measured(engine: Engine, repetitions: int) -> dict[str, float]:
    """The same of an engine: medians."""
    seconds = {}
    for batch in BATCHES:
        decode_seconds(engine, batch, 0)  # warms up
        trials = [decode_seconds(engine, batch, seed) for seed in range(1, repetitions + 1)]
        seconds[f"decode, batch {batch}"] = statistics.median(trials)
    trials = [prompt_seconds(engine, PREFILL, seed) for seed in range(repetitions + 1)]
    return seconds | {f"prompt of {PREFILL}": statistics.median(trials[1:])}


def prompt_seconds(engine: Engine, tokens: int, seed: int) -> float:
    """From a random prompt to its first token."""
    prompt = np.random.default_rng(seed).integers(0, engine.config.vocab_size, tokens).tolist()
    began = time.perf_counter()
    engine.generate([prompt], SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True))
    return time.perf_counter() - began


def compared(model: str, predictions: dict[str, float], measurements: dict[str, float]) -> list[dict[str, Any]]:
    """Both times of each prediction, and their ratio."""
    return [
        {
            "model": model,
            "what": what,
            "predicted_ms": 1e3 * seconds,
            "measured_ms": 1e3 * measurements[what],
            "ratio": seconds / measurements[what],
        }
        for what, seconds in predictions.items()
    ]


@contextlib.contextmanager
def engine_of(model: Path, sequences: int = max(BATCHES), tokens: int = PREFILL) -> Iterator[Engine]:
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
        max_num_seqs=sequences,
        max_num_batched_tokens=tokens,
    ) as engine:
        yield engine


def show(numbers: dict[str, Any], console: Console) -> None:
    memory, products, step, layer = (
        format_number(numbers["rates"][name], 3) for name in ("memory_gbps", "gflops", "step_ms", "layer_ms")
    )
    console.print(
        f"measured: memory {memory} GB/s, products {products} GFLOP/s, "
        f"{step} ms per step and {layer} ms per layer beside",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    table = Table()
    for column in ("model", "what", "predicted", "measured", "ratio"):
        table.add_column(column, justify="left" if column in ("model", "what") else "right")
    for row in numbers["rows"]:
        times = (f"{format_number(row[f'{kind}_ms'], 3)} ms" for kind in ("predicted", "measured"))
        table.add_row(row["model"], row["what"], *times, f"{row['ratio']:.2f}")
    console.print(table)


def _tiny_step(folder: Path, machine: Target, depth: int, repetitions: int) -> float:
    """Seconds of a decode step of a tiny model beside what is predicted of it."""
    path = folder / f"tiny-{depth}"
    write_random_checkpoint(path, TINY | {"num_hidden_layers": depth})
    with engine_of(path, sequences=1, tokens=PROMPT) as engine:
        decode_seconds(engine, 1, 0)
        seconds = statistics.median(decode_seconds(engine, 1, seed) for seed in range(1, repetitions + 1))
        return max(0.0, seconds - predicted(engine.config, machine)["decode, batch 1"])


if __name__ == "__main__":
    raise SystemExit(main())
