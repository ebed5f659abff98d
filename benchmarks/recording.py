"""What recording a routing trace costs while decoding: `python -m benchmarks.recording --json FILE`.

One engine, every expert resident. Trials with and without a recorder alternate, each in turn the first of its pair; a
trial prefills a batch and times its decode steps. What counts is the median over pairs of the ratio of the two trials'
mean step times, so that a recorder's rare long work (writing a snapshot of the file) is in it. The same ratio of CPU
seconds, all threads together, also counts what the writing thread does beside the decoding one until the file is
finished, and means something on a busy machine.
"""

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import timing
from benchmarks.timing import DecodingBatch, Seconds
from emoe_jax import EmoeError, Engine
from emoe_jax.demo import demo_model
from emoe_jax.errors import one_line

PROMPT = 16  # tokens before decoding starts
BATCHES = (1, 8)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recording", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--model", default=str(demo_model()), help="checkpoint directory or hub id (the bundled demo model)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")
    parser.add_argument("--pairs", type=int, default=8, help="trials with and without, per batch (default %(default)s)")
    parser.add_argument("--steps", type=int, default=600, help="decode steps per trial (default %(default)s)")
    options = parser.parse_args(argv)
    for name in ("pairs", "steps"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}; it must be at least 1")
    try:
        numbers = measure(options.model, options.pairs, options.steps)
        show(numbers, Console())
        if options.json is not None:
            options.json.write_text(json.dumps(numbers, indent=2) + "\n")
    except (EmoeError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


def measure(model: str, pairs: int, steps: int) -> dict[str, Any]:
    """`overhead` by batch as a fraction (0.05 is 5 %), and the median seconds per step of both kinds of trial."""
    numbers: dict[str, Any] = {"model": Path(model).name, "pairs": pairs, "steps": steps, "batches": {}}
    with (
        tempfile.TemporaryDirectory() as folder,
        Engine.load(
            model,
            expert_memory="100%",
            policy="static",
            prefix_caching=False,
            max_model_len=PROMPT + steps + 1 + DecodingBatch.MARGIN,
            max_num_seqs=max(BATCHES),
            task_profile=None,
        ) as engine,
    ):
        names = (Path(folder) / f"{number}.npz" for number in itertools.count())
        for B in BATCHES:
            trial(engine, B, steps, next(names))  # compiles all shapes that a trial meets
            plain: list[Seconds] = []
            recording: list[Seconds] = []
            for pair in range(pairs):
                for recorded in (pair % 2 == 0, pair % 2 == 1):
                    times = trial(engine, B, steps, next(names) if recorded else None)
                    (recording if recorded else plain).append(times)
            numbers["batches"][str(B)] = {
                "overhead": overhead([t.wall for t in recording], [t.wall for t in plain]),
                "cpu_overhead": overhead([t.cpu for t in recording], [t.cpu for t in plain]),
                "recording_step_s": statistics.median(t.wall for t in recording),
                "plain_step_s": statistics.median(t.wall for t in plain),
            }
    return numbers


def trial(engine: Engine, batch: int, steps: int, trace: Path | None) -> Seconds:
    """Decode a batch, recorded to `trace` if that is given: seconds per step, CPU seconds with those of the finished
    file, so that nothing is left to a thread that writes later.
    """
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, engine.config.vocab_size, (batch, PROMPT)).tolist()
    if trace is not None:
        engine.record_traces(trace)
    decoding = DecodingBatch(engine, prompts, steps + 1)
    seconds = timing.per_call(decoding.step, steps)
    decoding.stop()
    began = time.process_time()
    engine.stop_recording()
    return seconds._replace(cpu=seconds.cpu + (time.process_time() - began) / steps)


def overhead(recording: Sequence[float], plain: Sequence[float]) -> float:
    """Median over pairs, as a fraction."""
    return statistics.median(with_ / without for with_, without in zip(recording, plain, strict=True)) - 1


def show(numbers: dict[str, Any], console: Console) -> None:
    table = Table(title=f"decoding with {numbers['model']}, {numbers['pairs']} pairs of {numbers['steps']} steps")
    for column in ("batch", "step", "step while recording", "overhead", "overhead in CPU time"):
        table.add_column(column, justify="right")
    for batch, row in numbers["batches"].items():
        table.add_row(
            batch,
            f"{row['plain_step_s'] * 1e3:.2f} ms",
            f"{row['recording_step_s'] * 1e3:.2f} ms",
            f"{row['overhead']:+.1%}",
            f"{row['cpu_overhead']:+.1%}",
        )
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
