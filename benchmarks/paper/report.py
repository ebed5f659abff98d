"""Rows as a table on the terminal, as a page with plots, and as JSON."""

from __future__ import annotations

import json
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


def plots(rows: Sequence[Row], folder: Path) -> None:
    """One picture, `ID.png`, for each row that has one."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    for row in rows:
        if row.claim.plot is None:
            continue
        figure = pyplot.figure(figsize=(9, 4.5), layout="constrained")
        row.claim.plot(row.numbers, figure)
        figure.suptitle(f"{row.claim.id}: {row.claim.claim}")
        figure.savefig(folder / f"{row.claim.id}.png", dpi=90)
        pyplot.close(figure)


def page(found: dict[str, Any], folder: Path) -> str:
    """The page in Markdown, which lies beside `folder`, of the rows and runs of `found` and of the pictures there."""
    headlines = [row for row in found["rows"] if row["id"].startswith(HEADLINE)]
    figures = [row for row in found["rows"] if not row["id"].startswith(HEADLINE)]
    lines = [_INTRODUCTION.format(**found)]
    for run in found.get("later", []):
        lines += [_LATER.format(**run | {"ids": ", ".join(f"`{id}`" for id in run["ids"])})]
    if headlines:
        lines += ["## Headlines", "", markdown_table(headlines), ""]
    lines += ["## Figures and tables", "", markdown_table(figures), ""]
    for row in figures:
        lines += [f"## {row['id']}", "", _sentence(row["claim"]), ""]
        lines += [f"- Paper: {row['paper']}.", f"- Here: {row['here']}."]
        if row["because"]:
            lines += [f"- Agrees: {row['agrees']}. {_sentence(row['because'])}"]
        else:
            lines += [f"- Agrees: {row['agrees']}."]
        lines += [f"- More of it: `{row['command']}`", ""]
        if (folder / f"{row['id']}.png").exists():
            lines += [f"![{row['claim']}]({folder.name}/{row['id']}.png)", ""]
    return "\n".join(lines)


def markdown_table(rows: Sequence[dict[str, Any]]) -> str:
    """Paper, here, how measured, agrees; of rows as they are in the JSON."""
    lines = ["| | claim | paper | here | how measured | agrees |", "|---|---|---|---|---|---|"]
    for row in rows:
        cells = (_cell(row[name]) for name in ("id", "claim", "paper", "here", "how", "agrees"))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def write(rows: Sequence[Row], described: dict[str, Any], out: Path, with_plots: bool, order: Sequence[str]) -> None:
    """`OUT.md`, and the rows and plots in the folder `OUT`. Rows that are there and are not measured now stay, in the
    `order` of their ids.
    """
    if with_plots:
        plots(rows, out)
    found, path = as_json(rows, described), out / "rows.json"
    if path.exists():
        found = _merged(json.loads(path.read_text(encoding="utf-8")), found, order)
    write_json(found, path)
    out.with_name(out.name + ".md").write_text(page(found, out) + "\n", encoding="utf-8")


def _merged(old: dict[str, Any], new: dict[str, Any], order: Sequence[str]) -> dict[str, Any]:
    """`old` with the rows of `new`, whose run is one of the `later` ones, unless nothing of `old` is left."""
    ids = [row["id"] for row in new["rows"]]
    kept = [row for row in old["rows"] if row["id"] not in ids and row["id"] in order]
    if not kept:
        return new
    later = [{**run, "ids": [id for id in run["ids"] if id not in ids]} for run in old.get("later", [])]
    later.append({key: value for key, value in new.items() if key != "rows"} | {"ids": ids})
    rows = sorted([*kept, *new["rows"]], key=lambda row: order.index(row["id"]))
    return old | {"rows": rows, "later": [run for run in later if run["ids"]]}


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
_LATER = """{ids}: measured later, with seed {seed}, {prompts} prompts and {requests} requests in {turns} turns, by

```sh
{command}
```
"""
