"""The grid as tables and curves."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

Grid = dict[str, dict[str, dict[str, float]]]  # policy -> share resident -> measure -> value

# Colours that the colour-blind tell apart (Okabe and Ito), and a line style each for print.
STYLES: dict[str, tuple[str, str]] = {
    "emoe": ("#D55E00", "-"),
    "emoe-no-refresh": ("#E69F00", "--"),
    "emoe-paper": ("#E69F00", ":"),
    "lru": ("#0072B2", "-"),
    "lfu": ("#56B4E9", "--"),
    "pre-gated": ("#CC79A7", "-"),
    "static-task": ("#009E73", "-."),
    "static-global": ("#009E73", ":"),
    "static": ("#009E73", ":"),
    "random": ("#999999", ":"),
    "next-layer-router": ("#CC79A7", "-."),
    "activation-matrix": ("#CC79A7", "--"),
    "oracle": ("#000000", "-"),
}
TABLES = {
    "coverage": ("Coverage: assignments whose expert was resident", "{:.3f}"),
    "experts_moved_per_token_layer": ("Experts moved per token and layer", "{:.3f}"),
    "page_in_free_tokens": ("Tokens that found all experts of all layers", "{:.3f}"),
    "stall_seconds_per_token": ("Stall per token under exact, milliseconds", "{:.1f}"),
}
_SCALE = {"stall_seconds_per_token": 1e3}


def print_grid(grid: Grid, title: str, console: Console) -> None:
    """One table per measure, a row per policy and a column per residency."""
    for measure, (what, form) in TABLES.items():
        table = Table(title=f"{what} ({title})", title_justify="left")
        table.add_column("policy", no_wrap=True)
        for share in next(iter(grid.values())):
            table.add_column(f"{float(share):.0%}", justify="right")
        for policy, cells in grid.items():
            scale = _SCALE.get(measure, 1)
            table.add_row(policy, *(form.format(scale * cell[measure]) for cell in cells.values()))
        console.print(table)


def plot_grid(grid: Grid, title: str, path: Path) -> None:
    """Coverage, traffic, and one against the other."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(19, 6), layout="constrained")
    for policy, cells in grid.items():
        colour, line = STYLES[policy]
        shares = [100 * float(share) for share in cells]
        covered = [100 * cell["coverage"] for cell in cells.values()]
        moved = [cell["experts_moved_per_token_layer"] for cell in cells.values()]
        style = {"color": colour, "linestyle": line, "marker": "o", "markersize": 3, "label": policy}
        panels[0].plot(shares, covered, **style)
        panels[1].plot(shares, moved, **style)
        panels[2].plot(moved, covered, **style)
        panels[2].annotate(policy, (moved[-1], covered[-1]), (4, -9), textcoords="offset points", color=colour, size=8)
    for panel in panels[:2]:
        panel.set_xlabel("experts resident, %")
        panel.invert_xaxis()
    panels[0].set_ylabel("assignments covered, %")
    panels[1].set_ylabel("experts moved per token and layer")
    panels[2].set_xlabel("experts moved per token and layer (a point per residency)")
    panels[2].set_ylabel("assignments covered, %")
    for panel in panels[1:]:
        (panel.set_yscale if panel is panels[1] else panel.set_xscale)("symlog", linthresh=0.01)
    for panel in panels:
        panel.grid(alpha=0.3)
    panels[1].set_ylim(bottom=0)
    panels[0].legend(loc="lower left", fontsize=9)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
