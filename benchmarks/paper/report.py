"""Rows as a table on the terminal, as a page with plots, and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.paper.claim import Row
from benchmarks.results import write_json

HEADLINE = "headline-"
"""What ids of the paper's headlines begin with."""


def print_rows(rows: Sequence[Row], console: Console) -> None:
    """One table."""
    table = Table("row", "paper", "here", "how", "agrees", title_justify="left")
    for row in rows:
        here = row.conclusion.here + (f" ({row.conclusion.because})" if row.conclusion.because else "")
        table.add_row(row.claim.id, row.claim.paper, here, row.claim.how, row.conclusion.agrees)
    console.print(table, markup=False)


def as_json(rows: Sequence[Row], described: dict[str, Any]) -> dict[str, Any]:
    """`rows` beside what the run was."""
    return {**described, "rows": [row.as_json() for row in rows]}


def plots(rows: Sequence[Row], folder: Path) -> dict[str, Path]:
    """One picture for each row that has one; their files by row."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    drawn = {}
    for row in rows:
        if row.claim.plot is None:
            continue
        figure = pyplot.figure(figsize=(9, 4.5), layout="constrained")
        row.claim.plot(row.numbers, figure)
        figure.suptitle(f"{row.claim.id}: {row.claim.claim}")
        drawn[row.claim.id] = folder / f"{row.claim.id}.png"
        figure.savefig(drawn[row.claim.id], dpi=90)
        pyplot.close(figure)
    return drawn


def page(rows: Sequence[Row], described: dict[str, Any], drawn: dict[str, Path], folder: Path) -> str:
    """The page in Markdown, which lies beside `folder`."""
    headlines = [row.as_json() for row in rows if row.claim.id.startswith(HEADLINE)]
    figures = [row for row in rows if not row.claim.id.startswith(HEADLINE)]
    lines = [_INTRODUCTION.format(**described)]
    if headlines:
        lines += ["## Headlines", "", markdown_table(headlines), ""]
    lines += ["## Figures and tables", "", markdown_table([row.as_json() for row in figures]), ""]
    for row in figures:
        lines += [f"## {row.claim.id}", "", _sentence(row.claim.claim), ""]
        lines += [f"- Paper: {row.claim.paper}.", f"- Here: {row.conclusion.here}."]
        if row.conclusion.because:
            lines += [f"- Agrees: {row.conclusion.agrees}. {_sentence(row.conclusion.because)}"]
        else:
            lines += [f"- Agrees: {row.conclusion.agrees}."]
        lines += [f"- More of it: `{row.claim.command}`", ""]
        if row.claim.id in drawn:
            lines += [f"![{row.claim.claim}]({folder.name}/{drawn[row.claim.id].name})", ""]
    return "\n".join(lines)


def markdown_table(rows: Sequence[dict[str, Any]]) -> str:
    """Paper, here, how measured, agrees; of rows as they are in the JSON."""
    lines = ["| | claim | paper | here | how measured | agrees |", "|---|---|---|---|---|---|"]
    for row in rows:
        cells = (_cell(row[name]) for name in ("id", "claim", "paper", "here", "how", "agrees"))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def write(rows: Sequence[Row], described: dict[str, Any], out: Path, with_plots: bool) -> None:
    """`OUT.md`, and the rows and plots in the folder `OUT`."""
    drawn = plots(rows, out) if with_plots else {}
    write_json(as_json(rows, described), out / "rows.json")
    out.with_name(out.name + ".md").write_text(page(rows, described, drawn, out) + "\n", encoding="utf-8")


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


_INTRODUCTION = """# What of the paper holds here?

Made by

```sh
{command}
```

*eMoE* (Tairin et al., 2025, arXiv 2503.06823) measured Mixtral and OpenMoE on four A100 GPUs. Each row is one of its
measured claims, measured here on something that anyone can run:

- *live*: the bundled demo model in a running engine, on the CPUs of one machine.
- *replay*: recorded routing of the demo, and of further models whose traces were given.
- *aot*: the shapes of real models, by the engine's memory plan and by compiling its steps ahead of time.
- *modelled link*: live, but the transfer of an expert takes the time that a link of {link_gbps:g} GB/s needs for it.

A row agrees when the paper's numbers, or its statement, hold here. *Similarity* is the share of equal tokens, compared
with the model with all experts resident. Intervals are 95 %. Seed {seed}; {prompts} prompts of each task, {stretches}
stretches of each kind of text, {concurrency} sequences at a time; {requests} requests of each run under load.
"""
