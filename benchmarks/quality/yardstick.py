"""Whether the table can tell good residents from bad ones, on this model: what must hold before it says anything."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.quality.measure import FULL
from benchmarks.quality.scores import Row, mean_over
from benchmarks.quality.served import Cell
from benchmarks.quality.traffic import PROMPT_TASKS, TEXT_TASKS

SHARE = 0.4
_POINTS = 0.20  # of exact match that random experts must cost
_RATIO = 1.25  # what they must make of perplexity
_AT_LEAST = 2  # tasks, or kinds of text
NEEDS = ("random", "static-global", "emoe")


@dataclasses.dataclass(frozen=True)
class Verdict:
    """One claim; `holds` is None where the grid does not have what it is about."""

    claim: str
    holds: bool | None
    numbers: str
    required: bool = True
    """Whether `--check` asks for it."""

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """Under the contract `resident`, at 40 % of the experts."""
    cells = [FULL, *(Cell(policy, "resident", SHARE) for policy in NEEDS)]
    at = {
        cell.policy: {row.task: row for row in rows if dataclasses.replace(row.cell, options=()) == cell}
        for cell in cells
    }
    return [
        _exact_match(at[FULL.policy], at["random"]),
        _perplexity(at["random"]),
        _below(at, "similarity", PROMPT_TASKS, "similarity to the answers of all experts, mean over tasks"),
        _below(at, "exact_match", PROMPT_TASKS, "exact match, mean over tasks", required=False),
        _below(at, "perplexity_ratio", TEXT_TASKS, "perplexity ratio, geometric mean over texts", required=False),
    ]


def _exact_match(full: dict[str, Row], random: dict[str, Row]) -> Verdict:
    lost = {
        task: (full[task].numbers["exact_match"] or 0.0) - (random[task].numbers["exact_match"] or 0.0)
        for task in PROMPT_TASKS
        if task in random and task in full
    }
    enough = [task for task, points in lost.items() if points >= _POINTS - 1e-9]
    return Verdict(
        f"random experts at {SHARE:.0%} lose {100 * _POINTS:.0f} points of exact match on facts and another task",
        len(enough) >= _AT_LEAST and "facts" in enough if len(lost) >= _AT_LEAST and "facts" in lost else None,
        ", ".join(f"{task} {100 * points:.1f}" for task, points in lost.items()),
    )


def _perplexity(random: dict[str, Row]) -> Verdict:
    ratios = {kind: random[kind].numbers["perplexity_ratio"] or 0.0 for kind in TEXT_TASKS if kind in random}
    enough = [kind for kind, ratio in ratios.items() if ratio >= _RATIO]
    return Verdict(
        f"random experts at {SHARE:.0%} cost {100 * (_RATIO - 1):.0f} % of perplexity on {_AT_LEAST} kinds of text",
        len(enough) >= _AT_LEAST if len(ratios) >= _AT_LEAST else None,
        ", ".join(f"{kind} x{ratio:.2f}" for kind, ratio in ratios.items()),
    )


def _below(
    at: dict[str, dict[str, Row]], metric: str, tasks: Sequence[str], what: str, required: bool = True
) -> Verdict:
    """Whether `static-global` is worse than `emoe`, and the two intervals do not overlap."""
    claim = f"static-global lies below emoe at {SHARE:.0%} by {what}"
    shared = [task for task in tasks if task in at["static-global"] and task in at["emoe"]]
    if not shared:
        return Verdict(claim, None, "", required)
    is_ratio = metric == "perplexity_ratio"
    fixed, ours = (mean_over(metric, [at[policy][task] for task in shared]) for policy in ("static-global", "emoe"))
    worse, better = (ours, fixed) if is_ratio else (fixed, ours)
    form: Callable[[float], str] = (lambda value: f"x{value:.2f}") if is_ratio else (lambda value: f"{value:.1%}")
    numbers = ", ".join(
        f"{policy} {form(mean)} [{form(low)}, {form(high)}]"
        for policy, (mean, low, high) in (("static-global", fixed), ("emoe", ours))
    )
    return Verdict(claim, worse[2] < better[1], numbers, required)
