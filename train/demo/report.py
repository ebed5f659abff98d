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
    """Training loss and accuracy of answers over the steps, each with a running mean."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = [line["step"] for line in history]
    shown = {
        "loss": "weighted cross entropy, nats",
        "answer_accuracy": "answer tokens predicted",
        "fact_accuracy": "answer tokens predicted, facts",
    }
    figure, axes = pyplot.subplots(1, len(shown), figsize=(15, 4), layout="constrained")
    for axis, (name, label) in zip(axes, shown.items(), strict=True):
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
    """The evaluation: a table of tasks, one of facts by field, one of kinds of text, and how experts are shared."""
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
        for field, part in row.get("by_field", {}).items():
            table.add_row(f"  {field}", f"{part['exact_match']:.1%}")
    console.print(table)
    table = Table(title="real text, held-out documents, every expert resident")
    table.add_column("kind")
    for column in ("tokens", "perplexity", "routing entropy (bits)"):
        table.add_column(column, justify="right")
    for kind, row in numbers["texts"].items():
        table.add_row(kind, str(row["tokens"]), f"{row['perplexity']:.2f}", f"{row['routing_entropy_bits']:.2f}")
    console.print(table)
    table = Table(title="how much the use of experts differs: Jensen-Shannon divergence (bits), mean over layers")
    names = [*numbers["tasks"], *numbers["texts"]]
    table.add_column("")
    for name in names[1:]:
        table.add_column(name, justify="right")
    pairs = numbers["js_divergence_bits_by_layer"]
    for row, first in enumerate(names[:-1]):
        later = [f"{np.mean(pairs[f'{first}-{second}']):.2f}" for second in names[row + 1 :]]
        table.add_row(first, *[""] * row, *later)
    console.print(table)
    console.print(
        f"mean divergence {numbers['mean_js_divergence_bits']:.3f} bits; "
        f"QA where only the name tells two values apart: {numbers['qa_rivals_exact_match']:.1%}"
    )


def write_json(numbers: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(numbers, indent=2) + "\n")
