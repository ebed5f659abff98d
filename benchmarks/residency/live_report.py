"""Live results as tables and curves."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.residency.report import STYLES

_COLUMNS = (
    ("CLSFY", lambda cell: f"{cell['exact_match']['clsfy']:.1%}"),
    ("COMP", lambda cell: f"{cell['exact_match']['comp']:.1%}"),
    ("QA", lambda cell: f"{cell['exact_match']['qa']:.1%}"),
    ("perplexity", lambda cell: f"{cell['perplexity']:.3f}"),
    ("ratio", lambda cell: _ratio(cell, "perplexity_ratio")),
    ("substituted", lambda cell: f"{cell['substituted']:.1%}"),
    ("coverage", lambda cell: f"{cell['coverage']:.1%}"),
    ("decode b1", lambda cell: _ratio(cell, "decode_ratio_b1")),
    ("decode b16", lambda cell: _ratio(cell, "decode_ratio_b16")),
    ("host", lambda cell: f"{sum(cell.get(f'{part}_share', 0) for part in ('planning', 'prediction', 'commit')):.1%}"),
)


def print_live(results: dict[str, Any], console: Console) -> None:
    """One row per policy and residency; `host` is planning, prediction and commits as a share of step time."""
    table = Table(title="live: exact match and cost against all experts resident", title_justify="left")
    table.add_column("policy", no_wrap=True)
    table.add_column("resident", justify="right")
    for name, _ in _COLUMNS:
        table.add_column(name, justify="right")
    for policy, cells in results["live_policies"].items():
        for share, cell in cells.items():
            table.add_row(policy, f"{float(share):.0%}", *(show(cell) for _, show in _COLUMNS))
        table.add_section()
    console.print(table)
    switch = results["topic_switch"]
    console.print(
        f"topic switch at {switch['residency']:.0%}: coverage is back at 95 % of its steady "
        f"{switch['steady_coverage']:.1%} after {switch['prompts_to_recover']} prompts"
    )


_CURVES = (
    ("perplexity of reference answers, over all resident", lambda cell: cell["perplexity_ratio"]),
    ("assignments substituted, %", lambda cell: 100 * cell["substituted"]),
    ("exact match, mean of CLSFY, COMP and QA, %", lambda cell: 100 * statistics.mean(cell["exact_match"].values())),
    ("decoded tokens/s at batch 1, over all resident", lambda cell: cell["decode_ratio_b1"]),
    ("decoded tokens/s at batch 16, over all resident", lambda cell: cell["decode_ratio_b16"]),
)


def plot_live(results: dict[str, Any], path: Path) -> None:
    """What is measured of every policy by residency, and coverage around the topic switch. One legend for all."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(2, 3, figsize=(19, 11), layout="constrained")
    *panels, last = grid.flat
    for (what, value), panel in zip(_CURVES, panels, strict=True):
        for policy, cells in results["live_policies"].items():
            if policy == "full":
                continue
            colour, line = STYLES[policy]
            shares = [100 * float(share) for share in cells]
            style = {"color": colour, "linestyle": line, "marker": "o", "markersize": 4, "label": policy}
            panel.plot(shares, [value(cell) for cell in cells.values()], **style)
        panel.set_xlabel("experts resident, %")
        panel.set_ylabel(what)
        panel.invert_xaxis()
    reference = 100 * statistics.mean(results["live_policies"]["full"]["1"]["exact_match"].values())
    panels[2].axhline(reference, color="#000000", linestyle=":", linewidth=1, label="all experts resident")
    for panel in (panels[0], *panels[3:]):
        panel.axhline(1, color="#000000", linestyle=":", linewidth=1)
    switch = results["topic_switch"]
    last.plot([100 * value for value in switch["coverage_by_prompt"]], color="#D55E00", linewidth=1)
    last.axvline(switch["prompts_of_each"], color="#000000", linestyle=":", linewidth=1)
    last.annotate(
        f"{switch['from']} | {switch['to']}",
        (switch["prompts_of_each"], 0.02),
        (-30, 0),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
    )
    last.set_xlabel(f"prompt ({switch['residency']:.0%} resident)")
    last.set_ylabel("assignments served by the wished expert, %")
    for panel in grid.flat:
        panel.grid(alpha=0.3)
    lines, names = panels[2].get_legend_handles_labels()
    figure.legend(lines, names, loc="outside lower center", ncols=min(6, len(names)))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _ratio(cell: dict[str, Any], name: str) -> str:
    return f"{cell[name]:.2f}" if name in cell else ""
