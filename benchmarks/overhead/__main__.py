"""python -m benchmarks.overhead: milliseconds that the host adds to a step, and the HTTP layer to a token.

A decode step whose executables are replaced by their earlier results is nothing but host work. The real HTTP server
over an engine that computes nothing is nothing but HTTP. Both should stay below 1 ms: at 16 sequences, and 64 streams.
The scheduler alone, of ten thousand requests that wait at once, should take less than a second in all.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.arguments import count
from benchmarks.overhead.scheduling import scheduler_overhead
from benchmarks.overhead.steps import host_overhead
from emoe_jax.demo import demo_model
from emoe_jax.errors import EmoeError, one_line


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        from benchmarks.overhead.http import http_overhead  # needs httpx

        numbers = {
            "model": Path(options.model).name,
            "batch": options.batch,
            **host_overhead(options.model, options.batch, options.steps),
            **scheduler_overhead(options.requests),
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
    add("--json", type=Path, metavar="FILE", help="write the numbers there")
    return parser


if __name__ == "__main__":
    sys.exit(main())
