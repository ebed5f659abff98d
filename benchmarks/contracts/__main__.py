"""Routing contracts: quality against loads (`python -m benchmarks.contracts --json FILE`).

Live: a checkpoint serves the same traffic under `exact`, `bounded` with some tolerances, and `resident`. Replay: a
routing trace, for which all tolerances take one pass. `--plot FILE` draws perplexity against the loads waited for.
Follow (`--follow`): traffic that changes its tasks under a quality target; every answer is scored again with all
experts, whether the engine audits it or not. Audits (`--audit-check`, `--audit-cost`): whether they find what scoring
every token again finds, and what they cost. Shapes (`--shapes MODEL`): tokens per second of a large model over a
slow link. Of a trace they follow from its loads; a live run gets a link that is as slow for it.

JSON: `{"live": [{"contract", "tolerance", "share", "batch", "perplexity_ratio", "similarity", "loads_per_token",
"waits_per_token", "tokens_per_s", "substituted_weight", "account"}], "replay": {"0.5": [{"tolerance", "breaches",
"loads_per_token_layer", "substituted_weight", "free_tokens"}]}, "shapes": {"0.5": [{"contract", "tolerance", "batch",
"loads_per_token_layer", "substituted_weight", "tokens_per_s", "over_exact"}]}, "follow": {"phases", "windows",
"estimates", "tasks", "requests"}, "audit_check": {"rows": [{"task", "measure", "estimate", "low", "high", "of_all",
"within", "covers"}]}, "audit_cost": {"cost", "low", "high", "audit_share"}}`.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.table import Table

from benchmarks.arguments import count, positive
from benchmarks.contracts.account import ACCOUNT, PARTS
from benchmarks.contracts.audits import check, cost
from benchmarks.contracts.follow import follow
from benchmarks.contracts.live import measure, settings_of
from benchmarks.contracts.replay import DECAY, replay
from benchmarks.contracts.scores import Observed, policy_scores, worth
from benchmarks.contracts.shapes import Shapes, first_choices, modelled
from benchmarks.contracts.steps import replay_steps
from benchmarks.quality.__main__ import share
from benchmarks.quality.measure import Traffic
from benchmarks.quality.served import Cell
from benchmarks.quality.traffic import ALL_TASKS, Count
from benchmarks.residency.forecasts import learn_from
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
    add("--shapes", metavar="MODEL", help="tokens/s of this model, such as mixtral-8x7b, over --link-gbps (25)")
    add("--card", default="a100-80gb", metavar="NAME", help="whose memory --shapes is in (default a100-80gb)")
    add("--trace", type=Path, metavar="FILE", help="also replay this routing trace, its last quarter of prompts")
    add("--choices", type=count, metavar="N", help="of the trace's routers that count, best first (default all)")
    add("--trace-tokens", type=count, default=20_000, metavar="N", help="of it, at most (default 20000)")
    add(
        "--exchange",
        type=positive,
        metavar="SHARE",
        help="load an expert whose score is so much higher than a resident one's; without it, as breaches ask",
    )
    add(
        "--scores",
        choices=("weights", "emoe"),
        default="weights",
        help="what decides in the replay who goes: mean weights (default), or what the policy emoe expects",
    )
    add(
        "--observed",
        choices=get_args(Observed),
        default="wishes",
        help="what emoe is told of: wishes (default), their weights, or wishes of which breaches count for more",
    )
    add("--predictor", type=Path, metavar="DIR", help="of emoe (default: learned from the trace's other prompts)")
    add("--decay", type=tolerance, default=DECAY, metavar="SHARE", help=f"of mean weights, per token (default {DECAY})")
    add("--follow", metavar="PERCENT", help="a quality target, such as 1%%, to follow through the tasks in halves")
    add("--follow-requests", type=count, default=40, metavar="N", help="of each task (default 40)")
    add(
        "--audit-rate",
        type=tolerance,
        default=0.01,
        metavar="SHARE",
        help="of answers that are audited, where audits are measured (default 0.01)",
    )
    add("--audit-check", action="store_true", help="compare audits with all tokens, scored again")
    add("--audit-cost", action="store_true", help="tokens/s with audits and without, in turns")
    add(
        "--audit-contract",
        choices=("bounded", "resident"),
        default="bounded",
        help="under which --audit-check and --audit-cost serve (default bounded, with the first of --tolerances)",
    )
    add("--turns", type=count, default=8, metavar="N", help="of --audit-cost, each (default 8)")
    add("--no-live", action="store_true", help="replay only")
    add("--seed", type=int, default=0, help="of prompts and their order (default 0)")
    add("--json", type=Path, metavar="FILE", help="write the numbers here, after every row")
    add("--plot", type=Path, metavar="FILE.png", help="draw perplexity against loads")
    given = parser.parse_args(argv)
    audits = given.audit_check or given.audit_cost
    if given.no_live and given.trace is None and given.follow is None and not audits:
        parser.error("--no-live needs a --trace, --follow or --audit-...: nothing else is left to measure")
    if audits and not given.audit_rate:
        parser.error("--audit-check and --audit-cost need an --audit-rate above 0")
    if given.shapes is not None and given.link_gbps is None:
        given.link_gbps = 25.0
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
    shapes = None if given.shapes is None else Shapes.of(given.shapes, given.card, given.link_gbps)
    if given.trace is not None:
        results["replay"] = _replayed(given, console)
        write_json(results, given.json)
        if shapes is not None:
            results["shapes"] = _modelled(given, shapes, console)
            write_json(results, given.json)
    if given.audit_check or given.audit_cost:
        _audited(given, results, console)
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
            shapes,
        )
        for row in rows:
            results["live"].append(row)
            write_json(results, given.json)
        show(console, f"{given.model}: served", [_flat(row) for row in results["live"]])
        console.print(ACCOUNT)
        show(console, "milliseconds / calls per step", [_accounted(row) for row in results["live"]])
    if given.plot is not None and results["live"]:
        plot(results["live"], given.plot)


def _replayed(given: argparse.Namespace, console: Console) -> dict[str, list[dict[str, float]]]:
    """By share, a row for each tolerance. Breaches depend on the tolerance, so scores made of them take a pass each."""
    traces = read_traces(given.trace, None, given.predictor)
    tested = _first_tokens(traces.replayed, given.trace_tokens)
    tolerances = [0.0, *sorted(given.tolerances)]
    exchange = math.inf if given.exchange is None else given.exchange
    together = given.scores == "weights" or given.observed != "breaches"
    learned = None
    if given.scores == "emoe":
        tell = partial(console.print, style="dim")
        learned = learn_from(traces.trained, traces.predictor, traces.dynamics, tell)
    found: dict[str, list[dict[str, float]]] = {f"{part:g}": [] for part in given.shares}
    for some in [tolerances] if together else [[each] for each in tolerances]:
        scores = None if learned is None else policy_scores(tested, learned, worth(tested, given.observed, some[0]))
        for part in given.shares:
            options = {"exchange": exchange, "decay": given.decay, "scores": scores}
            found[f"{part:g}"] += replay(tested, traces.trained, part, some, **options)
    for part in given.shares:
        title = f"{given.trace.name}: {len(tested.experts):,} tokens, {part:.0%} resident"
        show(console, title, found[f"{part:g}"])
    return found


def _modelled(given: argparse.Namespace, shapes: Shapes, console: Console) -> dict[str, list[dict[str, Any]]]:
    """By share, a row for each tolerance and batch: speeds of these shapes by the loads of the trace."""
    traces = read_traces(given.trace, None, None)
    tested = _first_tokens(traces.replayed, given.trace_tokens)
    choices = given.choices or tested.top_k
    tested, trained = first_choices(tested, choices), first_choices(traces.trained, choices)
    tolerances = [0.0, *sorted(set(given.tolerances) - {0.0})]
    found: dict[str, list[dict[str, Any]]] = {}
    for part in given.shares:
        rows = found[f"{part:g}"] = []
        for batch in given.batches:
            rows += modelled(shapes, replay_steps(tested, trained, part, tolerances, batch, decay=given.decay), batch)
        what = f"{given.trace.name}, {tested.top_k} choices each, {part:.0%} resident"
        where = f"{shapes.name} in {given.card}, {given.link_gbps:g} GB/s, {1e3 * shapes.load_seconds:.1f} ms per load"
        show(console, f"{where}; {what}", rows)
    return found


def _audited(given: argparse.Namespace, results: dict[str, Any], console: Console) -> None:
    traffic = Traffic.of(given.model, given.tasks, Count(given.prompts, given.stretches), given.seed)
    batch = given.batches[0]
    options: dict[str, Any] = {"audit_rate": given.audit_rate, "link_gbps": given.link_gbps}
    what = given.audit_contract
    if what == "bounded":
        options["tolerance"] = given.tolerances[0]
        what += f" {given.tolerances[0]:g}"
    cell = Cell(given.policy, given.audit_contract, given.shares[0], tuple(options.items()))
    what += f", {cell.share:.0%} resident, {given.audit_rate:.1%} audited"

    def tell(title: str) -> None:
        console.print(title, style="dim")

    if given.audit_check:
        found = results["audit_check"] = check(given.model, traffic, cell, batch, given.seed, tell)
        write_json(results, given.json)
        show(console, f"{what}: {found['audits']} audits, {found['given_up']} given up", found["rows"])
    if given.audit_cost:
        found = results["audit_cost"] = cost(given.model, traffic, cell, batch, given.turns, given.seed, tell)
        write_json(results, given.json)
        show(console, f"{what}, {given.turns} turns", [{k: v for k, v in found.items() if k != "ratios"}])


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
