"""The rows as tables on the terminal, and what the yardstick says."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from benchmarks.quality.scores import EMBEDDING, Row, interval
from benchmarks.quality.yardstick import Verdict

_COLUMNS = {
    "exact_match": "exact match",
    "similarity": "similarity",
    "rouge_l": "ROUGE-L",
    EMBEDDING: "embedding",
    "perplexity_ratio": "perplexity",
    "substituted": "substituted",
    "substituted_weight": "of weight",
}


def print_rows(rows: Sequence[Row], console: Console) -> None:
    """A table per task, one line per cell."""
    for task in dict.fromkeys(row.task for row in rows):
        some = [row for row in rows if row.task == task]
        names = [name for name in _COLUMNS if any(row.numbers.get(name) is not None for row in some)]
        table = Table(title=f"{task}, {some[0].items} items, 95 % intervals", title_justify="left")
        for heading in ("policy", "contract"):
            table.add_column(heading, no_wrap=True)
        for heading in ("resident", *(_COLUMNS[name] for name in names)):
            table.add_column(heading, justify="right")
        for row in some:
            where = (row.cell.name, row.cell.contract, f"{row.cell.share:.0%}")
            table.add_row(*where, *(_shown(row, name) for name in names))
        console.print(table)


def _shown(row: Row, name: str) -> str:
    value = row.numbers.get(name)
    if value is None:
        return ""
    low, high = interval(row.resampled[name])
    if name == "perplexity_ratio":
        return f"x{value:.2f} ({low:.2f} to {high:.2f})"
    return f"{100 * value:.1f} % ({100 * low:.0f} to {100 * high:.0f})"


def print_verdicts(found: Sequence[Verdict], console: Console) -> None:
    """A line each: yes, no, or not measured, and the numbers."""
    for verdict in found:
        answer = {True: "yes", False: "no", None: "not measured"}[verdict.holds]
        console.print(f"{answer}: {verdict.claim} ({verdict.numbers or 'not in this run'})", highlight=False)
