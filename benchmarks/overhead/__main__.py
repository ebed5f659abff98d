"""python -m benchmarks.overhead: milliseconds that the host adds to a step, and the HTTP layer to a token.

A decode step whose executables are replaced by their earlier results is nothing but host work. The real HTTP server
over an engine that computes nothing is nothing but HTTP. Both should stay below 1 ms: at 16 sequences, and 64 streams.
Arguments of a step cost the host some time. Weights of layers that are stacked in one argument cost more.
The scheduler alone, of ten thousand requests that wait at once, should take less than a second in all.

With `--layers` and `--experts` it measures instead how warm-up, step and the engine's thread grow with the model:
random models of a quarter, a half and all of these sizes. The thread should stay below 1.2 ms at 48 layers of 128
experts.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.arguments import count
from benchmarks.overhead.arguments import argument_overhead
from benchmarks.overhead.growth import growth, sizes_up_to
from benchmarks.overhead.scheduling import scheduler_overhead
from benchmarks.overhead.steps import host_overhead
from emoe_jax.demo import demo_model
from emoe_jax.errors import EmoeError, one_line


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    if (options.layers is None) != (options.experts is None):
        parser.error("--layers and --experts go together: one random model has so many of both")
    if options.experts is not None and options.experts < 8:
        parser.error(f"--experts is {options.experts}; a layer of the random model has at least 8")
    try:
        if options.layers is not None:
            _show_growth(options)
            return 0
        from benchmarks.overhead.http import http_overhead  # needs httpx

        numbers = {
            "model": Path(options.model).name,
            "batch": options.batch,
            **host_overhead(options.model, options.batch, options.steps),
            **scheduler_overhead(options.requests),
            **argument_overhead(),
            "streams": options.streams,
            **http_overhead(options.streams, options.tokens, options.period_ms / 1e3),
        }
        table = Table(show_header=False, title="overhead")
        for name, value in numbers.items():
            table.add_row(name.replace("_", " "), f"{value:.3f}" if isinstance(value, float) else str(value))
        Console().print(table)
        if options.json is not None:
            options.json.write_text(json.dumps(numbers, indent=1) + "\n")
    except (EmoeError, ImportError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _show_growth(options: argparse.Namespace) -> None:
    """The curve up to the size that was asked for, a line as soon as it is measured, and where the thread's time went
    at the largest size."""
    curve = []
    for size in sizes_up_to(options.layers, options.experts):
        curve.append(growth(size, options.batch, options.steps))
        row = curve[-1]
        print(
            f"{row['layers']} layers of {row['experts']} experts: warm-up {row['warm_up_seconds']:.1f} s "
            f"({row['warm_up_cpu_seconds']:.1f} s on CPUs), step {row['step_ms']:.2f} ms, "
            f"engine's thread {row['thread_ms']:.2f} ms",
            flush=True,
        )
    table = Table("part of the engine's thread", *(f"{row['layers']} x {row['experts']}, ms" for row in curve))
    for name in curve[-1]["parts"]:
        table.add_row(name, *(f"{row['parts'].get(name, 0.0):.3f}" for row in curve))
    Console().print(table)
    if options.json is not None:
        options.json.write_text(json.dumps({"growth": curve}, indent=1) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.overhead", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--model", default=str(demo_model()), help="checkpoint directory or hub id (the bundled demo model)")
    add("--batch", type=count, default=16, help="sequences of a decode step")
    add("--steps", type=count, default=500, help="steps that are timed")
    add("--requests", type=count, default=10_000, help="requests that the scheduler alone is timed on")
    add("--streams", type=count, default=64, help="clients that read tokens at once")
    add("--tokens", type=count, default=200, help="tokens of each stream")
    add("--period-ms", type=count, default=100, help="time from one token of a stream to the next")
    add("--layers", type=count, help="measure growth up to so many layers, and nothing else (with --experts)")
    add("--experts", type=count, help="measure growth up to so many experts per layer (with --layers)")
    add("--json", type=Path, metavar="FILE", help="write the numbers there")
    return parser


if __name__ == "__main__":
    sys.exit(main())
