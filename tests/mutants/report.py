"""Outcomes of mutants as a table and as JSON."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tests.mutants.mutant import Mutant
from tests.mutants.trial import Outcome


def print_list(console: Console, mutants: Sequence[Mutant]) -> None:
    """Names, what is cut, and where."""
    table = Table("mutant", "what is cut", "file")
    for mutant in mutants:
        table.add_row(*map(escape, (mutant.name, mutant.cuts, mutant.file)))
    console.print(table)


def print_outcomes(console: Console, outcomes: Sequence[Outcome]) -> None:
    """A row per mutant, then what is wrong with those that were not killed, then the totals."""
    table = Table("mutant", "what is cut", "verdict", "s")
    table.columns[-1].justify = "right"
    for mutant, verdict, seconds, _ in outcomes:
        colour = "green" if verdict == "killed" else "red"
        table.add_row(escape(mutant.name), escape(mutant.cuts), f"[{colour}]{verdict}[/]", f"{seconds:.1f}")
    console.print(table)
    for outcome in outcomes:
        if not outcome.is_killed:
            console.print(f"{outcome.mutant.name} {outcome.verdict}: {outcome.detail}", markup=False, soft_wrap=True)
    totals = Counter(outcome.verdict for outcome in outcomes)
    others = "".join(f", {count} {verdict}" for verdict, count in totals.items() if verdict != "killed")
    console.print(f"{totals['killed']} of {len(outcomes)} mutants killed{others}", markup=False)


def write_outcomes(outcomes: Sequence[Outcome], path: Path) -> None:
    """`{"mutants": [{"name", "cuts", "file", "tests", "verdict", "seconds", "detail"}], "survivors": [name]}`."""
    rows = [
        {
            "name": mutant.name,
            "cuts": mutant.cuts,
            "file": mutant.file,
            "tests": list(mutant.tests),
            "verdict": verdict,
            "seconds": round(seconds, 3),
            "detail": detail,
        }
        for mutant, verdict, seconds, detail in outcomes
    ]
    survivors = [outcome.mutant.name for outcome in outcomes if not outcome.is_killed]
    path.write_text(json.dumps({"mutants": rows, "survivors": survivors}, indent=1) + "\n", encoding="utf-8")
