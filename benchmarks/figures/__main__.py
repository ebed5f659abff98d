"""`python -m benchmarks.figures --trace FILE --plots DIR --json OUT`: the eMoE paper's figures 3, 7, 8 and 9, and the
routing side of its figure 10, from any routing trace."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.figures import measures, report
from emoe_jax.errors import EmoeError, one_line, require
from emoe_jax.policies.learning import learn_transitions
from emoe_jax.traces import RoutingTrace, TraceError

DISTANCES = range(1, 21)


def main(argv: Sequence[str] | None = None) -> int:
    given = parse(argv)
    console = Console(width=None if sys.stdout.isatty() else 160)
    try:
        if given.plots is not None:
            require("matplotlib")
        trace = RoutingTrace.load(given.trace)
        numbers = measure(trace, given.layers, given.shares, given.longest, given.seed)
        report.print_numbers(numbers, console)
        if given.json is not None:
            given.json.write_text(json.dumps(numbers, indent=1) + "\n")
        if given.plots is not None:
            given.plots.mkdir(parents=True, exist_ok=True)
            report.plot(numbers, given.plots)
    except (EmoeError, ImportError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.figures", description=__doc__)
    add = parser.add_argument
    add("--trace", type=Path, required=True, metavar="FILE", help="routing trace (.npz)")
    add(
        "--layers",
        type=int,
        nargs="+",
        metavar="M",
        help="heat maps from MoE layer M to M + 1, numbered from 0 (default: four pairs spread over the model)",
    )
    add("--shares", type=float, nargs="+", default=[0.25, 0.5, 0.75], metavar="SHARE", help="resident, for figure 10")
    add("--longest", type=int, default=80, metavar="P", help="prompts served by one prompt's experts (default 80)")
    add("--seed", type=int, default=0, help="of pairs and tokens drawn at random, for comparison")
    add("--json", type=Path, metavar="FILE", help="write the numbers here")
    add("--plots", type=Path, metavar="DIR", help="write the figures as PNG files here")
    given = parser.parse_args(argv)
    if not all(0 < share <= 1 for share in given.shares):
        parser.error("shares of resident experts lie between 0 and 1")
    if given.longest < 1:
        parser.error(f"--longest is {given.longest}; it must be at least 1")
    if given.seed < 0:
        parser.error(f"--seed is {given.seed}; it must be at least 0")
    return given


def measure(
    trace: RoutingTrace, layers: Sequence[int] | None, shares: Sequence[float], longest: int, seed: int
) -> dict[str, Any]:
    """All figures' numbers by name. Raises `TraceError` where the trace has too little for them."""
    pairs = trace.num_layers - 1
    routed = len(set(trace.sample.tolist()))
    if pairs < 1 or routed < 2:
        raise TraceError(
            f"{trace.source} has {trace.num_layers} MoE layers and {routed} prompts with routing; "
            "figures need two of each"
        )
    shown = sorted(set(layers or (round(i * (pairs - 1) / 3) for i in range(4))))
    for layer in shown:
        if not 0 <= layer < pairs:
            raise TraceError(f"--layers names {layer}; MoE layers with one behind them are 0 to {pairs - 1}")
    transitions = learn_transitions(trace)
    return {
        "trace": {"model": trace.describe(), "prompts": routed, "tokens": trace.num_tokens},
        "transitions": {str(layer): transitions[layer].round(4).tolist() for layer in shown},
        "between_layers": measures.between_layers(trace, seed),
        "between_prompts": measures.between_prompts(trace, DISTANCES, seed),
        "served_by_one": measures.served_by_one(trace, shares, longest),
    }


if __name__ == "__main__":
    raise SystemExit(main())
