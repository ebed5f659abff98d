"""Figures 5 and 13: which tasks suffer when layers are routed at random, and what loading by tasks is worth."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from benchmarks.paper.bench import ENGINE, SHARE, Bench
from benchmarks.paper.claim import Claim, Conclusion, Numbers
from benchmarks.quality.served import Cell
from train.sensitivity import __main__ as sensitivity
from train.tasks import TASKS

_ROBUST = ("clsfy", "comp")
_LONG = ("conv", "qa", "sum")


def randomised(bench: Bench) -> Numbers:
    """Similarity to the resident model's answers, by task and share of last layers that are routed exactly."""
    sizes = bench.sizes
    argv = ["--split", "test", "--seed", str(bench.seed)]
    argv += ["--prompts-per-task", str(sizes.sensitivity_prompts), "--depths", str(sizes.depths)]

    def make() -> Numbers:
        found = sensitivity.measure(sensitivity.arguments(["--model", bench.model, *argv]), Console(quiet=True))
        layers = found["num_layers"]
        return {
            task: {
                f"{1 - depth['layers'] / layers:g}": [depth["similarity"], *depth["similarity_ci95"]]
                for depth in entry["progressive"]
            }
            for task, entry in found["tasks"].items()
        }

    return bench.kept("sensitivity", {"argv": argv}, ENGINE, make)


def conclude_randomised(numbers: Numbers) -> Conclusion:
    """The paper's four statements, each by itself."""

    def at(task: str, share: float) -> float:
        known = numbers[task]
        return known[min(known, key=lambda text: abs(float(text) - share))][0]

    statements = {
        "CLSFY and COMP > 90 % with no exact layer": all(at(task, 0) > 0.9 for task in _ROBUST),
        "QA > 80 % at 50 %": at("qa", 0.5) > 0.8,
        "SUM < 80 % at 50 %": at("sum", 0.5) < 0.8,
        "CONV < 80 % at 75 %": at("conv", 0.75) < 0.8,
    }
    none = ", ".join(f"{task.upper()} {at(task, 0):.0%}" for task in _ROBUST)
    half = ", ".join(f"{task.upper()} {at(task, 0.5):.0%}" for task in ("qa", "sum"))
    here = f"no exact layer: {none}; half exact: {half}; CONV {at('conv', 0.75):.0%} at 75 %"
    failed = [text for text, holds in statements.items() if not holds]
    if not failed:
        return Conclusion(here, "yes")
    agrees = "partly" if len(failed) < len(statements) else "no"
    return Conclusion(here, agrees, f"not here: {'; '.join(failed)}")


def plot_randomised(numbers: Numbers, figure: Any) -> None:
    """A curve of each task with its interval."""
    axis = figure.subplots()
    for task, curve in numbers.items():
        shares = sorted(curve, key=float)
        x, (mean, low, high) = [100 * float(share) for share in shares], zip(*(curve[s] for s in shares), strict=True)
        axis.plot(x, mean, marker=".", label=task.upper())
        axis.fill_between(x, low, high, alpha=0.15)
    axis.set(xlabel="last layers routed exactly, %", ylabel="similarity to the resident model's answers", ylim=(0, 1))
    axis.legend()


AWARE = Cell("emoe", "resident", SHARE)
AGNOSTIC = Cell("emoe", "resident", SHARE, (("task_profile", None),))
"""No task is told from another: no lengths, no sensitivity, and the predictor sees one task."""


def loading(bench: Bench) -> Numbers:
    """Similarity by task, with and without knowledge of tasks."""
    aware, agnostic = bench.cells([AWARE, AGNOSTIC])
    return {
        name: {task: [cell["rows"][task]["similarity"], *cell["rows"][task]["ci95"]["similarity"]] for task in TASKS}
        for name, cell in (("task-aware", aware), ("task-agnostic", agnostic))
    }


def conclude_loading(numbers: Numbers) -> Conclusion:
    """Same on short tasks, better on long ones; a difference counts where intervals do not overlap."""
    aware, agnostic = numbers["task-aware"], numbers["task-agnostic"]
    here = ", ".join(f"{task.upper()} {aware[task][0]:.0%} / {agnostic[task][0]:.0%}" for task in aware)
    better = [task for task in _LONG if aware[task][1] > agnostic[task][2]]
    worse = [task for task in aware if aware[task][2] < agnostic[task][1]]
    here = f"aware / agnostic: {here}"
    if len(better) == len(_LONG) and not worse:
        return Conclusion(here, "yes")
    told = ", ".join(task.upper() for task in better) or "no task"
    reason = f"clearly better for {told}: elsewhere the intervals overlap"
    if worse:
        reason += f"; clearly worse for {', '.join(task.upper() for task in worse)}"
    return Conclusion(here, "partly" if better and not worse else "no", reason)


def plot_loading(numbers: Numbers, figure: Any) -> None:
    """Bars by task."""
    axis = figure.subplots()
    for offset, (name, tasks) in zip((-0.2, 0.2), numbers.items(), strict=True):
        means = [values[0] for values in tasks.values()]
        errors = [[v[0] - v[1] for v in tasks.values()], [v[2] - v[0] for v in tasks.values()]]
        axis.bar([x + offset for x in range(len(tasks))], means, 0.38, yerr=errors, capsize=3, label=name)
    axis.set_xticks(range(len(TASKS)), [task.upper() for task in TASKS])
    axis.set(ylabel=f"similarity at {SHARE:.0%} resident", ylim=(0, 1))
    axis.legend()


CLAIMS = (
    Claim(
        "fig5",
        "output similarity when only the last layers are routed exactly",
        "CLSFY, COMP > 90 % with no exact layer; QA > 80 % at 50 %; SUM < 80 % at 50 %; CONV < 80 % at 75 %",
        "live",
        "python -m train.sensitivity --json out.json",
        randomised,
        conclude_randomised,
        plot_randomised,
    ),
    Claim(
        "fig13",
        "task-aware against task-agnostic loading",
        "same on CLSFY and COMP, better on CONV, QA and SUM",
        "live",
        "python -m benchmarks.quality --policies emoe --shares 0.4",
        loading,
        conclude_loading,
        plot_loading,
    ),
)
