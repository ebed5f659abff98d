"""Table 2 and section 5.7: how often predictors are right, and what a prediction and its loads cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.paper.bench import ENGINE, SHARE, Bench
from benchmarks.paper.claim import Claim, Conclusion, Numbers
from benchmarks.quality.served import Cell
from emoe_jax.predictor.config import ARCHITECTURES
from emoe_jax.traces import RoutingTrace
from train.predictor import compare

_COMMAND = "python -m train.predictor.compare --traces FILE"
_PAPER = "GPT-2 51, BERT 16, XLNet 71 % (eMoE-L, Mixtral; eMoE-A 51, 16, 71); P / R / F1 0.712 / 0.713 / 0.705"


def accuracy(bench: Bench) -> Numbers:
    """The paper's Table 2 on each trace: rows by architecture and variant."""

    def of(path: Path) -> Numbers:
        argv = ["--traces", str(path), "--steps", str(bench.sizes.network_steps), "--seed", str(bench.seed)]
        options = compare.arguments(argv)
        return compare.compare(RoutingTrace.load(path), options, Console(quiet=True))

    steps = {"steps": bench.sizes.network_steps}
    return {
        name: bench.kept(f"predictors-{name}", {"trace": path.name, **steps}, ENGINE, lambda path=path: of(path))
        for name, path in bench.traces.items()
    }


def conclude_accuracy(numbers: Numbers) -> Conclusion:
    """XLNet first, BERT last, and as often right as the paper's."""
    told, first, right, alike = [], True, True, True
    for name, found in numbers.items():
        rows = {key: row for key, row in found["rows"].items() if key.split(", ")[0] in ARCHITECTURES}
        given = {key: row.get("given_earlier_layers", row)["top_k_accuracy"] for key, row in rows.items()}
        by_arch = {arch: given[f"{arch}, layer-by-layer"] for arch in ARCHITECTURES}
        prior = found["rows"]["prior alone"]["given_earlier_layers"]["top_k_accuracy"]
        best = rows["xlnet, layer-by-layer"]
        three = " / ".join(f"{best[metric]['0.5']:.2f}" for metric in ("precision", "recall", "f1"))
        told.append(
            f"{name}: "
            + ", ".join(f"{arch} {value:.0%}" for arch, value in by_arch.items())
            + f" (eMoE-L, given earlier layers), xlnet {rows['xlnet, all-layer']['top_k_accuracy']:.0%} (eMoE-A); the "
            f"closed form alone {prior:.0%}; P / R / F1 of xlnet at 50 % {three}"
        )
        first &= by_arch["xlnet"] == max(by_arch.values())
        right &= by_arch["xlnet"] >= 0.70
        alike &= max(by_arch.values()) - min(by_arch.values()) < 0.02
    here = "; ".join(told)
    if first and right and not alike:
        return Conclusion(here, "yes")
    reasons = []
    if alike:
        reasons.append("all networks correct the same closed-form forecast, which leaves them little to differ in")
    elif not first:
        reasons.append("XLNet is not the best of the three")
    if not right:
        reasons.append(
            "top-k accuracy stays below the paper's 70 %: more experts are nearly as likely as the chosen ones"
        )
    return Conclusion(here, "partly" if right or first else "no", "; ".join(reasons))


def plot_accuracy(numbers: Numbers, figure: Any) -> None:
    """Bars of each trace."""
    axes = figure.subplots(1, len(numbers), squeeze=False, sharey=True)[0]
    for axis, (name, found) in zip(axes, numbers.items(), strict=True):
        rows = found["rows"]
        axis.barh([*rows], [row["top_k_accuracy"] for row in rows.values()], label="before the prompt")
        given = {
            key: row["given_earlier_layers"]["top_k_accuracy"]
            for key, row in rows.items()
            if "given_earlier_layers" in row
        }
        axis.plot([*given.values()], [*given], "k|", markersize=14, label="given earlier layers")
        axis.set(title=name, xlabel="top-k accuracy", xlim=(0, 1))
        axis.invert_yaxis()
        axis.legend()


PERIODS = (1, 40)


def cost(bench: Bench) -> Numbers:
    """Seconds of predictions and of loads per call of the predictor, and as shares of the time in steps."""
    cells = bench.cells(Cell("emoe-paper", "resident", SHARE, (("predict_every", p),)) for p in PERIODS)
    found = {}
    for period, cell in zip(PERIODS, cells, strict=True):
        planner, loads = cell["planner"], cell["loads"]
        calls = max(1, planner["predictions"])
        found[str(period)] = {
            "calls": planner["predictions"],
            "predict_seconds": planner["seconds"] / calls,
            "load_seconds": loads["busy_seconds"] / calls,
            "share": (planner["seconds"] + loads["busy_seconds"]) / cell["step_seconds"],
            "step_seconds": cell["step_seconds"] / calls,
        }
    return found


def conclude_cost(numbers: Numbers) -> Conclusion:
    """At p = 40, 0.24 to 3.11 % of request time."""
    told = "; ".join(
        f"p = {period}: {1e3 * of['predict_seconds']:.1f} ms + {1e3 * of['load_seconds']:.1f} ms, {of['share']:.1%} "
        f"of the time in steps ({of['calls']} calls)"
        for period, of in numbers.items()
    )
    here = f"predict + load per call: {told}"
    share = numbers["40"]["share"]
    if share <= 0.0311:
        return Conclusion(here, "yes")
    between = numbers["40"]["step_seconds"]
    return Conclusion(
        here, "no", f"40 answers of the demo take {between:.2f} s of steps, and a call is not that much shorter"
    )


CLAIMS = (
    Claim(
        "table2",
        "accuracy of the predictors",
        _PAPER,
        "replay",
        _COMMAND,
        accuracy,
        conclude_accuracy,
        plot_accuracy,
    ),
    Claim(
        "sec5.7",
        "predict and load time per call",
        "eMoE-A 0.38 / 0.33 s, eMoE-L 1.39 / 4.21 s (OpenMoE / Mixtral); 0.24 to 3.11 % of request time at p = 40",
        "live",
        "python -m benchmarks.quality --policies emoe-paper --shares 0.4",
        cost,
        conclude_cost,
    ),
)
