"""The numbers as a table on the terminal, and as plots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def print_tables(numbers: dict[str, Any], console: Console) -> None:
    """Per task: similarity with the first layers random (the paper's Fig. 5), KL of each layer alone, and `s`."""
    tasks = numbers["tasks"]
    first = next(iter(tasks.values()))
    table = Table(title=f"similarity to the resident model's answers, first layers of {numbers['model']} random")
    table.add_column("task")
    table.add_column("by")
    for row in first["progressive"]:
        table.add_column(str(row["layers"]), justify="right")
    table.add_column("insensitive", justify="right")
    for task, entry in tasks.items():
        shares = [f"{row['similarity']:.0%}" for row in entry["progressive"]]
        table.add_row(task, entry["judged_by"], *shares, str(entry["insensitive_layers"]))
    console.print(table)
    _by_layer("KL to the resident model, nats per token, one layer random", "{:.3f}", numbers, console, "kl")
    _by_layer("its standard error over prompts", "{:.3f}", numbers, console, "kl_error")
    _by_layer("sensitivity s", "{:.2f}", numbers, console, None)


def _by_layer(title: str, form: str, numbers: dict[str, Any], console: Console, key: str | None) -> None:
    table = Table(title=title)
    table.add_column("task")
    for layer in range(numbers["num_layers"]):
        table.add_column(str(layer), justify="right")
    for task, entry in numbers["tasks"].items():
        values = entry["sensitivity"] if key is None else [row[key] for row in entry["single"]]
        table.add_row(task, *(form.format(value) for value in values))
    console.print(table)


def plot(numbers: dict[str, Any], directory: Path) -> None:
    """`similarity.png`: the paper's Fig. 5. `divergence.png`: KL with one layer random, and with the first ones."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    def save(figure: Any, name: str) -> None:
        figure.savefig(directory / name, dpi=110)
        pyplot.close(figure)

    figure, axis = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for task, entry in numbers["tasks"].items():
        rows = [{"layers": 0, "similarity": 1.0}, *entry["progressive"]]
        label = f"{task} ({entry['judged_by'].replace('_', ' ')})"
        axis.plot([row["layers"] for row in rows], [row["similarity"] for row in rows], marker=".", label=label)
    axis.axhline(numbers["threshold"], color="grey", linestyle="--")
    axis.set_xlabel("MoE layers routed at random, from the input side")
    axis.set_ylabel("similarity to the resident model's answers")
    axis.legend()
    axis.grid(alpha=0.3)
    save(figure, "similarity.png")

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
    for task, entry in numbers["tasks"].items():
        left.plot([row["layer"] for row in entry["single"]], [row["kl"] for row in entry["single"]], marker=".")
        rows = entry["progressive"]
        right.plot([row["layers"] for row in rows], [row["kl"] for row in rows], marker=".", label=task)
    left.set_xlabel("the one MoE layer routed at random")
    right.set_xlabel("MoE layers routed at random, from the input side")
    left.set_ylabel("KL to the resident model, nats per answer token")
    left.set_yscale("log")
    right.legend()
    for axis in (left, right):
        axis.grid(alpha=0.3)
    save(figure, "divergence.png")
