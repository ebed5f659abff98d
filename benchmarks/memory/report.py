"""Memory as tables and curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

_COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_GB = 1e9


def print_numbers(numbers: dict[str, Any], console: Console) -> None:
    """What is needed by length and by batch, then what there is room for."""
    load, model = numbers["load"], numbers["model"]
    rows = {share: cell for share, cell in numbers["resident"].items() if "problem" not in cell}
    described = _described(model)
    for name, title in (
        ("by_prompt_length", f"GB by prompt length, batch {load['batch']} ({described})"),
        ("by_batch", f"GB by batch, prompts of {load['prompt_length']} tokens ({described})"),
    ):
        table = Table(title=title, title_justify="left")
        table.add_column("resident", justify="right")
        table.add_column("slots", justify="right")
        for value in next(iter(rows.values()), {}).get(name, {}):
            table.add_column(value, justify="right")
        for share, cell in rows.items():
            sizes = (f"{size / _GB:.2f}" for size in cell[name].values())
            table.add_row(f"{float(share):.0%}", str(cell["slots"]), *sizes)
        console.print(table)
    for name, title in (
        ("same_device", f"room on a device of {numbers['device_bytes'] / _GB:g} GB"),
        ("same_memory", "room where all experts and the load above have it"),
    ):
        table = Table(title=title, title_justify="left")
        for column in ("resident", "memory", "saved", "longest prompt", "ratio", "within the model", "batch", "ratio"):
            table.add_column(column, justify="right")
        for share, cell in rows.items():
            room = cell[name]
            table.add_row(
                f"{float(share):.0%}",
                f"{cell['memory'] / _GB:.2f} GB",
                f"{cell['memory_saved']:.1%}",
                f"{room['longest_prompt']:,}" if room["longest_prompt"] else "does not fit",
                _ratio(room["prompt_ratio"]),
                f"{room['longest_prompt_within_model']:,}",
                f"{room['largest_batch']:,}",
                _ratio(room["batch_ratio"]),
            )
        console.print(table)
    for share, cell in numbers["resident"].items():
        if "problem" in cell:
            console.print(f"{float(share):.0%}: {cell['problem']}", markup=False)


def plot(numbers: dict[str, Any], path: Path) -> None:
    """The paper's figures 17 and 18: memory by prompt length, and by batch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    load, model = numbers["load"], numbers["model"]
    figure, panels = pyplot.subplots(1, 2, figsize=(13, 5), layout="constrained", sharey=True)
    rows = {share: cell for share, cell in numbers["resident"].items() if "problem" not in cell}
    for panel, name in zip(panels, ("by_prompt_length", "by_batch"), strict=True):
        for colour, (share, cell) in zip(_COLOURS * len(rows), rows.items(), strict=False):
            sizes = [size / _GB for size in cell[name].values()]
            label = f"{float(share):.0%} resident ({cell['slots']} slots)"
            panel.plot([int(value) for value in cell[name]], sizes, color=colour, marker=".", label=label)
        panel.axhline(numbers["device_bytes"] / _GB, color="#999999", linestyle=":", label="the device")
        panel.set_xscale("log", base=2)
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
    panels[0].set_xlabel(f"prompt tokens (batch {load['batch']})")
    panels[1].set_xlabel(f"batch (prompts of {load['prompt_length']} tokens)")
    panels[0].set_ylabel("weights, expert slab and KV cache, GB")
    panels[0].legend()
    figure.suptitle(_described(model))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _described(model: dict[str, Any]) -> str:
    experts = "" if model["expert_format"] == model["dtype"] else f", experts in {model['expert_format']}"
    return f"{model['name']}, {model['dtype']}{experts}"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"
