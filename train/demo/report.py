"""What a run leaves for people: the loss curve as PNG, the table on the terminal, the numbers as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table


def plot_loss(history: Sequence[dict[str, float]], path: Path) -> None:
    """Training loss and answer accuracy over the steps, each with a running mean."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = [line["step"] for line in history]
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, name, label in zip(
        axes, ("loss", "answer_accuracy"), ("weighted cross entropy, nats", "answer tokens predicted"), strict=True
    ):
        values = [line[name] for line in history]
        axis.plot(steps, values, linewidth=0.5, alpha=0.35)
        axis.plot(steps, _running_mean(values, 50), linewidth=1.5)
        axis.set_xlabel("step")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_yscale("log")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _running_mean(values: Sequence[float], width: int) -> np.ndarray:
    """Mean over the last `width` values, fewer at the beginning."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - width, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def print_table(numbers: dict[str, Any], console: Console) -> None:
    """The evaluation, one row per task."""
    table = Table(title="demo model, test splits, every expert resident, greedy decoding")
    table.add_column("task")
    for column in ("exact match", "ROUGE-L", "perplexity", "routing entropy (bits)"):
        table.add_column(column, justify="right")
    for task, row in numbers["tasks"].items():
        exact, rouge = row.get("exact_match"), row.get("rouge_l")
        table.add_row(
            task,
            "" if exact is None else f"{exact:.1%}",
            "" if rouge is None else f"{rouge:.3f}",
            f"{row['perplexity']:.3f}",
            f"{row['routing_entropy_bits']:.2f}",
        )
    console.print(table)
    pairs = numbers["js_divergence_bits_by_layer"]
    table = Table(title="how much tasks differ in their use of experts: Jensen-Shannon divergence (bits) by layer")
    table.add_column("tasks")
    for layer in range(len(next(iter(pairs.values())))):
        table.add_column(str(layer), justify="right")
    for pair, by_layer in pairs.items():
        table.add_row(pair, *(f"{value:.2f}" for value in by_layer))
    console.print(table)
    console.print(
        f"mean divergence {numbers['mean_js_divergence_bits']:.3f} bits; "
        f"perplexity on real small talk {numbers['chitchat_perplexity']:.1f}; "
        f"QA where only the name tells two values apart: {numbers['qa_rivals_exact_match']:.1%}"
    )


def write_json(numbers: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(numbers, indent=2) + "\n")
