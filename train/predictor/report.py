"""What a run leaves for people: history as JSON lines, curves as PNG, the table on the terminal, numbers as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def plot(history: Sequence[dict[str, Any]], prior_coverage: float, path: Path) -> None:
    """Loss of every step; coverage of held-out prompts beside that of the prior, where training starts."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    left.plot([line["step"] for line in history], [line["cross_entropy"] for line in history], linewidth=0.8)
    left.set_ylabel("cross entropy, nats per layer")
    measured = [line for line in history if line["coverage"] is not None]
    right.plot(
        [line["step"] for line in measured], [line["coverage"] for line in measured], marker=".", label="predictor"
    )
    right.axhline(prior_coverage, color="grey", linestyle="--", label="closed forms alone")
    right.set_ylabel("coverage of held-out prompts, mean over budgets")
    right.legend()
    for axis in (left, right):
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def print_evaluation(numbers: dict[str, Any], console: Console) -> None:
    """Predictor and baselines, one row each, before any answer token; then with the first ones."""
    shape = numbers["config"]
    console.print(
        f"{numbers['prompts']} prompts, {numbers['assignments']:,} assignments; "
        f"{numbers['unseen_tasks']} tasks not seen in training; "
        f"{shape['num_layers']} MoE layers of {shape['num_experts']} experts, top-{shape['top_k']}"
    )
    if numbers["seen_prompts"]:
        console.print(
            f"[yellow]{numbers['seen_prompts']} of these prompts were trained on: not a held-out result[/yellow]"
        )
    _table("before any answer token", numbers, console)
    early = numbers["with_first_tokens"]
    _table(f"with the first {early['tokens']} answer tokens", early, console)
    for question, words in _GIVEN.items():
        if question in numbers:
            _given(words, numbers[question], console)
    console.print(
        f"{numbers['milliseconds_per_prediction']:.1f} ms per prediction; {numbers['parameters']:,} parameters, "
        f"{numbers['remembered_prompts']} remembered prompts"
    )


_GIVEN = {
    "given_earlier_layers": "each layer, given the true routing of earlier layers",
    "given_last_tokens": "an answer's next wishes, given those so far (experts chosen anew at each token)",
}


def _given(title: str, numbers: dict[str, Any], console: Console) -> None:
    table = Table(title=title)
    residencies = list(numbers["coverage"])
    for name in ("", *(f"coverage {float(residency):.0%}" for residency in residencies), "top-k"):
        table.add_column(name, justify="right" if name else "left")
    for name, row in [("predictor", numbers), *numbers["baselines"].items()]:
        cells = (*(row["coverage"][residency] for residency in residencies), row["top_k"])
        table.add_row(name.replace("_", " "), *(f"{value:.4f}" for value in cells))
    console.print(table)


def _table(title: str, numbers: dict[str, Any], console: Console) -> None:
    table = Table(title=title)
    residencies = list(numbers["coverage"])
    table.add_column("")
    for residency in residencies:
        table.add_column(f"coverage {float(residency):.0%}", justify="right")
    for name in ("P", "R", "F1"):
        table.add_column(f"{name} 50%", justify="right")
    for name in ("top-k", "KL"):
        table.add_column(name, justify="right")
    middle = residencies[len(residencies) // 2]
    for name, row in [("predictor", numbers), *numbers["baselines"].items()]:
        table.add_row(
            name.replace("_", " "),
            *(f"{row['coverage'][residency]:.4f}" for residency in residencies),
            *(f"{row[key][middle]:.3f}" for key in ("precision", "recall", "f1")),
            f"{row['top_k_accuracy']:.3f}",
            f"{row['kl']:.3f}",
            style="bold" if name == "predictor" else None,
        )
    console.print(table)


def write_json(numbers: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(numbers, indent=2) + "\n")
