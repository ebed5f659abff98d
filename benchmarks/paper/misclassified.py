"""Figure 19: what it costs when requests are taken for another task than their own."""

from __future__ import annotations

import dataclasses
from typing import Any

from benchmarks.paper.arrivals import FULL_BATCH
from benchmarks.paper.bench import ENGINE, SHARE, Bench
from benchmarks.paper.claim import Claim, Conclusion, Numbers
from benchmarks.quality.served import Cell
from benchmarks.serving.compare import on_one_device
from benchmarks.serving.in_process import run_in_process
from benchmarks.serving.live import Traffic
from benchmarks.serving.settings import Setting
from benchmarks.serving.workload import demo_samples

_RATE = 0.7


def measured(bench: Bench) -> Numbers:
    """By share of misnamed requests: mean latency under load, and means of quality."""
    shares = bench.sizes.misnamed
    cells = bench.cells(Cell("emoe", "resident", SHARE, misnamed=share) for share in shares)
    latency = bench.kept(
        "misnamed requests under load",
        {"shares": shares, "requests": bench.sizes.requests, "turns": bench.sizes.turns},
        (*ENGINE, "benchmarks/serving"),
        lambda: _latencies(bench),
    )
    return {
        f"{share:g}": {"latency": latency[f"{share:g}"], **cell["means"]}
        for share, cell in zip(shares, cells, strict=True)
    }


def _latencies(bench: Bench) -> Numbers:
    """Of the engine that figure 12 serves eMoE with."""
    sizes = bench.sizes
    load = Traffic(demo_samples(), (_RATE,), sizes.requests, seed=bench.seed, turns=sizes.turns, fixed_lengths=True)
    arguments, share = ["--model", bench.model], f"{SHARE:.0%}"
    batches, flags = on_one_device(share, FULL_BATCH, load, arguments)
    load = dataclasses.replace(load, concurrency=batches.partial)
    loads = [dataclasses.replace(load, misnamed=share) for share in sizes.misnamed]
    found: list[Numbers] = []
    run_in_process([Setting(share, "resident")], ["slo"], [*arguments, *flags], loads, bench.report, found.append)
    return {f"{share:g}": of["runs"][0]["mean_latency_s"] for share, of in zip(sizes.misnamed, found, strict=True)}


def conclude(numbers: Numbers) -> Conclusion:
    """Less than 10 % worse at 20 %, then a plateau."""
    shares = sorted(numbers, key=float)
    right = numbers[shares[0]]
    worse = {share: numbers[share]["latency"] / right["latency"] - 1 for share in shares[1:]}
    told = ", ".join(
        f"{float(share):.0%} misnamed: latency {100 * part:+.0f} %, similarity "
        f"{100 * (numbers[share]['similarity'][0] - right['similarity'][0]):+.1f} points"
        for share, part in worse.items()
    )
    if all(part < 0.1 for part in worse.values()):
        return Conclusion(told, "yes")
    early = [part for share, part in worse.items() if float(share) <= 0.2]
    within = bool(early) and all(part < 0.1 for part in early)
    rises = [*worse.values()] == sorted(worse.values())
    reason = "it does not stay within 10 %" + (
        " and goes on rising: wrong tasks bring wrong answer lengths into eq. 3"
        if rises
        else ", but without a trend: short runs differ by as much as that"
    )
    return Conclusion(told, "partly" if within else "no", reason)


def plot(numbers: Numbers, figure: Any) -> None:
    """Latency on the left, similarity on the right."""
    left, right = figure.subplots(1, 2)
    shares = sorted(numbers, key=float)
    x = [100 * float(share) for share in shares]
    left.plot(x, [numbers[share]["latency"] for share in shares], marker=".")
    left.set(xlabel="requests that name another task, %", ylabel="mean latency, s", ylim=(0, None))
    mean, low, high = zip(*(numbers[share]["similarity"] for share in shares), strict=True)
    right.plot(x, mean, marker=".")
    right.fill_between(x, low, high, alpha=0.15)
    right.set(xlabel="requests that name another task, %", ylabel="similarity", ylim=(0, 1))


CLAIMS = (
    Claim(
        "fig19",
        "latency by share of misclassified tasks",
        "< 10 % worse at 20 % misclassified, then a plateau",
        "live",
        "python -m benchmarks.serving --in-process --residency 40% --concurrency 9 --fixed-lengths",
        measured,
        conclude,
        plot,
    ),
)
