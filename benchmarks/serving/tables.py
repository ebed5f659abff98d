"""Runs as a table and as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

COLUMNS = {
    "policy": "{}",
    "rate_fraction": "{:.2f}",
    "rate_rps": "{:.2f}",
    "slo_attainment": "{:.1%}",
    "mean_latency_s": "{:.3f}",
    "p99_latency_s": "{:.3f}",
    "p50_ttft_s": "{:.3f}",
    "p99_ttft_s": "{:.3f}",
    "p50_tpot_s": "{:.4f}",
    "p99_itl_s": "{:.3f}",
    "goodput_rps": "{:.2f}",
    "throughput_tok_s": "{:.0f}",
    "max_wait_s": "{:.1f}",
}
INTERVALS = {
    "slo_attainment": "{:.1%}",
    "mean_latency_s": "{:.3f}",
    "p99_latency_s": "{:.3f}",
    "p50_ttft_s": "{:.3f}",
    "max_wait_s": "{:.1f}",
    "capacity_rps": "{:.2f}",
}
DIFFERENCES = {
    "slo_attainment": "{:+.1%}",
    "mean_latency_ratio": "{:.3f}",
    "p99_latency_ratio": "{:.3f}",
    "p50_ttft_ratio": "{:.3f}",
}
REPLICAS = {
    "replicas": "{}",
    "residency": "{}",
    "routing": "{}",
    "traffic": "{}",
    "rate_rps": "{:.0f}",
    "replica_routing": "{}",
    "threshold": "{}",
    "coverage": "{:.3f}",
    "loads_per_request": "{:.1f}",
    "slo_attainment": "{:.1%}",
    "mean_latency_s": "{:.3f}",
    "p99_ttft_s": "{:.3f}",
    "cached_tokens": "{:.1%}",
    "busiest": "{:.2f}",
}
RATIOS = ("throughput_ratio", "requests_ratio")


def print_replicas(runs: Sequence[dict[str, Any]], title: str) -> None:
    """Runs of several replicas."""
    Console(width=200).print(_table(runs, title, REPLICAS))


def _table(runs: Sequence[dict[str, Any]], title: str, columns: Mapping[str, str]) -> Table:
    table = Table(title=title)
    for name in columns:
        table.add_column(name.replace("_", " "), justify="right")
    for run in runs:
        cells = ["-" if run.get(name) is None else form.format(run[name]) for name, form in columns.items()]
        table.add_row(*cells)
    return table


def print_runs(runs: Sequence[dict[str, Any]], title: str) -> None:
    """All runs, and below them the attainment per task."""
    table = _table(runs, title, COLUMNS)
    tasks = Table(title="SLO attainment per task")
    names = sorted(runs[0]["slo_attainment_per_task"])
    for name in ("policy", "rate fraction", *names):
        tasks.add_column(name, justify="right")
    for run in runs:
        shares = [f"{run['slo_attainment_per_task'][name]:.1%}" for name in names]
        tasks.add_row(run["policy"], f"{run['rate_fraction']:.2f}", *shares)
    console = Console(width=200)
    console.print(table)
    console.print(tasks)


def print_intervals(report: Mapping[str, Any], title: str) -> None:
    """Means over the seeds with their 95 % intervals, and below them what policies gain or lose against others."""
    console = Console(width=200)
    where = ("residency", "routing", "rate_fraction", "policy")
    for rows, heading, columns, more in (
        (report["intervals"], title, INTERVALS, ()),
        (report["differences"], "attainment less, and times over, that of another policy", DIFFERENCES, ("against",)),
    ):
        if not rows:
            continue
        table = Table(title=heading)
        for name in (*where, *more, *columns):
            table.add_column(name.replace("_", " "), justify="right")
        for row in rows:
            cells = ["-" if row[name] is None else f"{row[name]}" for name in (*where, *more)]
            table.add_row(*cells, *(_interval(row.get(name), form) for name, form in columns.items()))
        console.print(table)


def _interval(found: Mapping[str, float | None] | None, form: str) -> str:
    if found is None:
        return "-"
    mean, low, high = (None if found[key] is None else form.format(found[key]) for key in ("mean", "low", "high"))
    return f"{mean}" if low is None else f"{mean} ({low} to {high})"


def print_ratios(report: Mapping[str, Any]) -> None:
    """What a comparison of residencies comes to."""
    table = Table(title="some experts resident over all resident, on equal memory")
    ratios = {name.replace("_", " "): _interval(report[name], "{:.2f}") for name in RATIOS}
    ratios["max batch ratio"] = f"{report['max_batch_ratio']:.2f}"
    for rate, ratio in report["mean_latency_ratios"].items():
        ratios[f"mean latency ratio at {float(rate):.0%}"] = _interval(ratio, "{:.2f}")
    for name in ratios:
        table.add_column(name, justify="right")
    table.add_row(*ratios.values())
    Console(width=200).print(table)


def plot_runs(runs: Sequence[dict[str, Any]], path: str | Path, title: str) -> None:
    """Attainment, mean latency and the 99th percentile of the first token over the rate, a line per policy."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = {
        "slo_attainment": "SLO attainment",
        "mean_latency_s": "mean latency, s",
        "p99_ttft_s": "99th percentile of the first token, s",
    }
    figure, axes = plt.subplots(1, len(panels), figsize=(13, 4), layout="constrained")
    for axis, (key, label) in zip(axes, panels.items(), strict=True):
        for policy in dict.fromkeys(run["policy"] for run in runs):
            points = sorted((run["rate_fraction"], run[key]) for run in runs if run["policy"] == policy)
            axis.plot(*zip(*points, strict=True), marker="o", label=policy)
        axis.set_xlabel("arrival rate, share of capacity")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)
