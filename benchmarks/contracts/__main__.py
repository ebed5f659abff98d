"""Routing contracts: quality against loads (`python -m benchmarks.contracts --json FILE`).

Live: a checkpoint serves the same traffic under `exact`, `bounded` with some tolerances, and `resident`. Replay: a
routing trace, for which all tolerances take one pass. `--plot FILE` draws perplexity against the loads waited for.
Follow (`--follow`): traffic that changes its tasks under a quality target; every answer is scored again with all
experts, whether the engine audits it or not.

JSON: `{"live": [{"contract", "tolerance", "share", "batch", "perplexity_ratio", "similarity", "loads_per_token",
"waits_per_token", "tokens_per_s", "substituted_weight", "account"}], "replay": {"0.5": [{"tolerance", "breaches",
"loads_per_token_layer", "substituted_weight", "free_tokens"}]}, "follow": {"phases", "windows", "estimates", "tasks",
"requests"}}`.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.arguments import count, positive
from benchmarks.contracts.account import ACCOUNT, PARTS
from benchmarks.contracts.follow import follow
from benchmarks.contracts.live import measure, settings_of
from benchmarks.contracts.replay import DECAY, replay
from benchmarks.quality.__main__ import share
from benchmarks.quality.measure import Traffic
from benchmarks.quality.traffic import ALL_TASKS, Count
from benchmarks.residency.split import read_traces
from benchmarks.results import write_json
from emoe_jax import EmoeError
from emoe_jax.errors import require
from emoe_jax.traces import RoutingTrace
from serve.options import DEMO_MODEL

TOLERANCES = (0.1, 0.2, 0.25, 0.3, 0.4)


def main(argv: Sequence[str] | None = None) -> int:
    given = parse_args(argv)
    console = Console(width=140)
    try:
        if given.plot is not None:
            require("matplotlib")
        run(given, console)
    except (EmoeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.contracts", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--model", default=str(DEMO_MODEL), metavar="DIR", help="checkpoint (default: the demo)")
    add("--policy", default="emoe", metavar="NAME", help="residency policy (default emoe)")
    add("--shares", type=share, nargs="+", default=[0.5], metavar="SHARE", help="of experts resident (default 0.5)")
    add("--batches", type=count, nargs="+", default=[4], metavar="N", help="sequences computed together (default 4)")
    add("--tolerances", type=tolerance, nargs="+", default=list(TOLERANCES), metavar="T", help="from 0 to 1")
    add("--tasks", nargs="+", choices=ALL_TASKS, default=list(ALL_TASKS), metavar="TASK", help="default all")
    add("--prompts", type=count, default=12, metavar="N", help="of each task (default 12)")
    add("--stretches", type=count, default=4, metavar="N", help="of each kind of text (default 4)")
    add("--link-gbps", type=positive, metavar="GBPS", help="a modelled link; without it loads take what they take")
    add("--trace", type=Path, metavar="FILE", help="also replay this routing trace, its last quarter of prompts")
    add("--trace-tokens", type=count, default=20_000, metavar="N", help="of it, at most (default 20000)")
    add(
        "--exchange",
        type=positive,
        metavar="SHARE",
        help="load an expert whose mean weight is so much higher than a resident one's; without it, as breaches ask",
    )
    add("--decay", type=tolerance, default=DECAY, metavar="SHARE", help=f"of mean weights, per token (default {DECAY})")
    add("--follow", metavar="PERCENT", help="a quality target, such as 1%%, to follow through the tasks in halves")
    add("--follow-requests", type=count, default=40, metavar="N", help="of each task (default 40)")
    add(
        "--audit-rate",
        type=tolerance,
        default=0.01,
        metavar="SHARE",
        help="of answers, where --follow is (default 0.01)",
    )
    add("--no-live", action="store_true", help="replay only")
    add("--seed", type=int, default=0, help="of prompts and their order (default 0)")
    add("--json", type=Path, metavar="FILE", help="write the numbers here, after every row")
    add("--plot", type=Path, metavar="FILE.png", help="draw perplexity against loads")
    given = parser.parse_args(argv)
    if given.no_live and given.trace is None and given.follow is None:
        parser.error("--no-live needs a --trace or --follow: nothing else is left to measure")
    return given


def tolerance(text: str) -> float:
    """For `type=` of an argument: from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share from 0 to 1")
    return value


def run(given: argparse.Namespace, console: Console) -> None:
    """Replay first, which takes seconds."""
    results: dict[str, Any] = {"model": given.model, "link_gbps": given.link_gbps, "live": [], "replay": {}}
    if given.trace is not None:
        traces = read_traces(given.trace, None, None)
        tested = _first_tokens(traces.replayed, given.trace_tokens)
        for part in given.shares:
            exchange = math.inf if given.exchange is None else given.exchange
            tolerances = [0.0, *sorted(given.tolerances)]
            rows = replay(tested, traces.trained, part, tolerances, exchange=exchange, decay=given.decay)
            results["replay"][f"{part:g}"] = rows
            show(console, f"{given.trace.name}: {len(tested.experts):,} tokens, {part:.0%} resident", rows)
        write_json(results, given.json)
    if given.follow is not None:
        results["follow"] = _followed(given, console)
        write_json(results, given.json)
    if not given.no_live:
        traffic = Traffic.of(given.model, given.tasks, Count(given.prompts, given.stretches), given.seed)
        rows = measure(
            given.model,
            settings_of(given.tolerances),
            given.shares,
            given.batches,
            given.policy,
            traffic,
            given.seed,
            given.link_gbps,
            lambda title: console.print(title, style="dim"),
        )
        for row in rows:
            results["live"].append(row)
            write_json(results, given.json)
        show(console, f"{given.model}: served", [_flat(row) for row in results["live"]])
        console.print(ACCOUNT)
        show(console, "milliseconds / calls per step", [_accounted(row) for row in results["live"]])
    if given.plot is not None and results["live"]:
        plot(results["live"], given.plot)


def _followed(given: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Half of the tasks, then the other half, then all."""
    counted = Count(given.follow_requests, given.follow_requests)
    traffic = Traffic.of(given.model, given.tasks, counted, given.seed)
    names = list(traffic.items)
    halves = [names[::2], names[1::2]] if len(names) > 1 else [names]
    phases = [{name: traffic.items[name][: 2 * given.follow_requests // 3] for name in half} for half in halves]
    phases.append({name: traffic.items[name][2 * given.follow_requests // 3 :] for name in names})
    found = follow(
        given.model,
        phases,
        traffic.context,
        given.shares[0],
        given.batches[0],
        given.policy,
        given.follow,
        given.audit_rate,
        given.seed,
        lambda title: console.print(title, style="dim"),
    )
    cost = f"audits take {found['audit_share']:.1%} of the time"
    show(
        console, f"{given.model}: a target of {given.follow}, {given.shares[0]:.0%} resident; {cost}", found["windows"]
    )
    if found["estimates"]:
        show(console, "audits against all answers under the same tolerance", found["estimates"])
    return found


def show(console: Console, title: str, rows: Sequence[dict[str, Any]]) -> None:
    """A table of rows with the same columns."""
    table = Table(title=title)
    for name in rows[0]:
        table.add_column(name.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*map(_cell, row.values()))
    console.print(table)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Perplexity over that of the full model against loads per token, a line for each share and batch."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for part, batch in dict.fromkeys((row["share"], row["batch"]) for row in rows):
        line = [row for row in rows if (row["share"], row["batch"]) == (part, batch)]
        x, y = [row["loads_per_token"] for row in line], [row["perplexity_ratio"] for row in line]
        axes.plot(x, y, marker="o", label=f"{part:.0%} resident, batch {batch}")
        for row in line:
            name = row["contract"] if row["tolerance"] is None else f"{row['tolerance']:g}"
            at = (row["loads_per_token"], row["perplexity_ratio"])
            axes.annotate(name, at, xytext=(0, 7), textcoords="offset points", ha="center", fontsize=8)
    axes.set(xlabel="loads waited for, per token", ylabel="perplexity / that of the full model")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _first_tokens(trace: RoutingTrace, most: int) -> RoutingTrace:
    """The first prompts with at most so many tokens, and at least one prompt."""
    ends = [int((trace.sample <= prompt).sum()) for prompt in range(trace.num_prompts)]
    return trace.select(range(max(1, sum(end <= most for end in ends))))


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    forwards = row["forwards"]
    shown = {name: value for name, value in row.items() if name not in ("forwards", "perplexity_ci95", "account")}
    return shown | {"whole/again/layered": "/".join(f"{forwards[name]:g}" for name in ("whole", "again", "layered"))}


def _accounted(row: dict[str, Any]) -> dict[str, Any]:
    account = row["account"]
    name = {column: row[column] for column in ("contract", "tolerance", "share", "batch")}
    parts = {part: f"{account[part]['ms']:.2f} / {account[part]['calls']:.1f}" for part in PARTS}
    return name | {"ms": account["ms_per_step"]} | parts


if __name__ == "__main__":
    sys.exit(main())
