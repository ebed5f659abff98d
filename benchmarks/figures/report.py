"""The figures' numbers as tables, and the figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

# Colours that the colour-blind tell apart (Okabe and Ito).
_ORANGE, _BLUE, _GREEN, _BLACK = "#D55E00", "#0072B2", "#009E73", "#000000"
_CURVES = (_ORANGE, _BLUE, _GREEN, "#CC79A7", "#E69F00", "#56B4E9")


def print_numbers(numbers: dict[str, Any], console: Console) -> None:
    """One table of correlations beside the paper's, one of coverage."""
    trace, layers, prompts = (numbers[name] for name in ("trace", "between_layers", "between_prompts"))
    title = f"{trace['model']}; {trace['prompts']} prompts, {trace['tokens']} tokens"
    next_one, distances = prompts["consecutive"], prompts["by_distance"]
    table = Table("correlation", "here", "for comparison", "paper", title=title, title_justify="left")
    table.add_row(
        "consecutive layers (fig. 7)", _text(layers["mean"]), f"{_text(layers['by_chance'])} by chance", "about 0.50"
    )
    table.add_row(
        "consecutive prompts (fig. 8)",
        _text(next_one["mean"]),
        f"{_text(prompts['any_pair'])} any pair; {_text(next_one['beyond_mean'])} beyond the mean",
        "0.4 to 0.6 (OpenMoE), 0.75 to 0.95 (Mixtral)",
    )
    table.add_row(
        "the same by task",
        f"{_text(next_one['same_task'])} same",
        f"{_text(next_one['other_task'])} another",
        "",
    )
    known = [value for value in distances.values() if value is not None]
    spread = f"{min(known):.3f} to {max(known):.3f}" if known else "-"
    table.add_row(f"i-th next prompt, i to {max(map(int, distances))} (fig. 9)", spread, "", "0.48 to 0.55")
    console.print(table)
    served = numbers["served_by_one"]
    shown = [p for p in (0, 1, 5, 10, 20, 40, 60, 80) if p <= served["longest"]]
    table = Table(title="coverage when one prompt's experts serve the next p (fig. 10)", title_justify="left")
    table.add_column("resident", justify="right")
    for p in shown:
        table.add_column(str(p), justify="right")
    for share, curve in served["coverage"].items():
        table.add_row(f"{float(share):.0%}", *(f"{curve[str(p)]:.3f}" for p in shown))
    console.print(table)


def plot(numbers: dict[str, Any], directory: Path) -> None:
    """`transitions.png` (the paper's Fig. 3), `correlations.png` (7, 8 and 9), `served_by_one.png` (10)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    def save(figure: Any, name: str) -> None:
        figure.savefig(directory / name, dpi=120)
        pyplot.close(figure)

    maps = numbers["transitions"]
    figure, axes = pyplot.subplots(
        1, len(maps), figsize=(4.4 * len(maps) + 1, 4.6), layout="constrained", squeeze=False
    )
    top = max(np.max(table) for table in maps.values())
    for axis, (layer, table) in zip(axes[0], maps.items(), strict=True):
        axis.imshow(table, cmap="viridis", vmin=0, vmax=top, interpolation="nearest")
        axis.set_xlabel(f"expert of MoE layer {int(layer) + 1}")
        axis.set_ylabel(f"expert of MoE layer {layer}")
    figure.colorbar(
        axes[0, 0].images[0], ax=axes[0].tolist(), label="share of the row's tokens that choose the column next"
    )
    figure.suptitle(f"expert transitions between consecutive layers: {numbers['trace']['model']}")
    save(figure, "transitions.png")

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(18, 5), layout="constrained", sharey=True)
    layers, prompts = numbers["between_layers"], numbers["between_prompts"]
    left.plot(
        [*map(_number, layers["by_layer"])], color=_ORANGE, marker=".", label="each expert with its strongest follower"
    )
    _level(left, layers["by_chance"], "tokens dealt at random")
    left.set_xlabel("from this MoE layer to the next")
    left.set_ylabel("correlation")
    left.set_title("consecutive layers")
    following = prompts["consecutive"]
    middle.plot([*map(_number, following["by_layer"])], color=_ORANGE, marker=".", label="each prompt with the next")
    _level(middle, following["same_task"], "next one of the same task, all layers", _GREEN)
    _level(middle, following["other_task"], "next one of another task, all layers", _BLUE)
    middle.set_xlabel("MoE layer")
    middle.set_title("consecutive prompts")
    for values, colour, label in (
        (prompts["by_distance"], _ORANGE, "each prompt with its i-th next"),
        (prompts["beyond_mean_by_distance"], _BLUE, "the same, beyond the mean of all prompts"),
    ):
        right.plot([int(i) for i in values], [_number(value) for value in values.values()], ".-", c=colour, label=label)
    _level(right, prompts["any_pair"], "any pair of prompts")
    right.set_xlabel("i")
    right.set_title("prompts further apart")
    for axis in (left, middle, right):
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.legend()
    save(figure, "correlations.png")

    served = numbers["served_by_one"]["coverage"]
    figure, axis = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for colour, (share, curve) in zip(_CURVES * len(served), served.items(), strict=False):
        covered = [100 * value for value in curve.values()]
        axis.plot([int(p) for p in curve], covered, color=colour, label=f"{float(share):.0%} resident")
        axis.axhline(100 * float(share), color=colour, linestyle=":", linewidth=1)
    axis.plot([], [], color=_BLACK, linestyle=":", linewidth=1, label="as many experts at random")
    axis.set_xlabel("p: prompts served by the experts of the one before them (0: itself)")
    axis.set_ylabel("assignments covered, %")
    axis.grid(alpha=0.3)
    axis.legend()
    save(figure, "served_by_one.png")


def _level(axis: Any, value: float | None, label: str, colour: str = _BLACK) -> None:
    if value is not None:
        axis.axhline(value, color=colour, linestyle=":", linewidth=1.5, label=label)


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
