"""Figures 12 and 18 (throughput), and the paper's headlines on speed: servers under load, on equal device memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.paper.bench import ENGINE, SHARE, Bench
from benchmarks.paper.claim import Claim, Conclusion, Numbers
from benchmarks.serving.compare import Batches, Kind, run_comparison
from benchmarks.serving.live import Traffic
from benchmarks.serving.workload import demo_samples

FULL_BATCH = 2
"""Sequences that have room beside all experts of the demo; with 40 % of them there is then room for 9, which are the
4.5 times as many of the paper's Mixtral (4 and 18)."""

ALL_FCFS, EMOE, PART_FCFS, ALL_SLO, ON_DEMAND = (
    "all, fcfs",
    "eMoE: 40 %, slo",
    "40 %, fcfs",
    "all, slo",
    "on demand, fcfs",
)
_COMMAND = f"python -m benchmarks.serving --compare-residency 40% --full-batch {FULL_BATCH} --fixed-lengths"


def kinds_of(share: str, batches: Batches) -> Sequence[Kind]:
    """All resident and eMoE; then its two halves alone, and loading on demand."""
    fcfs, slo = ("--scheduling-policy", "fcfs"), ("--scheduling-policy", "slo")
    exact = ("--routing", "exact", "--policy", "lru")
    return [
        Kind.of(ALL_FCFS, "100%", batches.full, *fcfs),
        Kind.of(EMOE, share, batches.partial, *slo),
        Kind.of(PART_FCFS, share, batches.partial, *fcfs),
        Kind.of(ALL_SLO, "100%", batches.full, *slo),
        Kind.of(ON_DEMAND, share, batches.partial, *fcfs, *exact),
    ]


def measured(bench: Bench) -> Numbers:
    """All kinds in turns: what they can do with as many users as they like, then mean latency by arrival rate."""
    sizes = bench.sizes
    load = Traffic(demo_samples(), sizes.rates, sizes.requests, seed=bench.seed, turns=sizes.turns, fixed_lengths=True)
    parameters = {"rates": sizes.rates, "requests": sizes.requests, "turns": sizes.turns, "full_batch": FULL_BATCH}

    def make() -> Numbers:
        arguments = ["--model", bench.model]
        _, found = run_comparison(f"{SHARE:.0%}", FULL_BATCH, load, arguments, bench.report, kinds_of)
        return found

    return bench.kept("servers under load", parameters, (*ENGINE, "benchmarks/serving"), make)


def _latencies(numbers: Numbers) -> dict[str, dict[float, float]]:
    found: dict[str, dict[float, float]] = {}
    for run in numbers["runs"]:
        found.setdefault(run["policy"], {})[run["rate_fraction"]] = run["mean_latency_s"]
    return found


def by_rate(numbers: Numbers) -> Conclusion:
    """9 to 17 % lower latency than with all experts resident."""
    latencies, busiest = _latencies(numbers), _busiest(numbers)
    full = latencies[ALL_FCFS][busiest]
    halves = ", ".join(f"{name} {latencies[name][busiest] / full:.2f}x" for name in (PART_FCFS, ALL_SLO, ON_DEMAND))
    return _enough(
        "mean latency against all resident: {} of its capacity" + f"; at {busiest:.0%}: {halves}", 0.09, numbers
    )


def latency(numbers: Numbers) -> Conclusion:
    """The headline: at least 17 % lower at every rate."""
    return _enough("mean latency {} of what all resident can serve", 0.17, numbers)


def _within(ratio: Mapping[str, float | None]) -> str:
    """The interval of a ratio, where there is one."""
    return "" if ratio["low"] is None else f" ({ratio['low']:.2f}x to {ratio['high']:.2f}x)"


def _change(saved: float) -> str:
    return f"{100 * abs(saved):.0f} % {'lower' if saved >= 0 else 'higher'}"


def _enough(here: str, least: float, numbers: Numbers) -> Conclusion:
    """Whether eMoE saves so much of the latency at every rate. `{}` in `here` stands for what it saves at each."""
    ratios = {float(rate): ratio for rate, ratio in numbers["mean_latency_ratios"].items()}
    saved = {rate: 1 - ratios[rate]["mean"] for rate in sorted(ratios)}
    here = here.format(
        ", ".join(f"{_change(part)} at {rate:.0%}{_within(ratios[rate])}" for rate, part in saved.items())
    )
    # A mean that is good enough says nothing where its interval has no saving in it, too.
    enough = {rate: part >= least and (ratios[rate]["high"] or 0.0) < 1 for rate, part in saved.items()}
    if all(enough.values()):
        return Conclusion(here, "yes")
    rates = ", ".join(f"{rate:.0%}" for rate in saved if not enough[rate])
    tpot = {(run["policy"], run["rate_fraction"]): run["p50_tpot_s"] for run in numbers["runs"]}
    worst = min(saved, key=lambda rate: saved[rate])
    reason = (
        f"less than {least:.0%} is saved at {rates} of capacity, or that is not certain: at {worst:.0%}, a token takes "
        f"{tpot[EMOE, worst] / tpot[ALL_FCFS, worst]:.1f} times as long among up to {numbers['batches']['partial']} "
        "sequences"
    )
    return Conclusion(here, "partly" if any(enough.values()) or max(saved.values()) > 0 else "no", reason)


def throughput(numbers: Numbers) -> Conclusion:
    """1.3 to 1.5 times, at a batch up to 4.5 times as large."""
    return _throughput(numbers, 1.3)


def highest(numbers: Numbers) -> Conclusion:
    """The headline: 1.5 times."""
    return _throughput(numbers, 1.5)


def _throughput(numbers: Numbers, least: float) -> Conclusion:
    ratio, batch = numbers["requests_ratio"]["mean"], numbers["max_batch_ratio"]
    batches, within = numbers["batches"], _within(numbers["requests_ratio"])
    here = (
        f"{ratio:.2f}x the requests/s{within}, at {batch:.1f}x the batch ({batches['full']} and {batches['partial']})"
    )
    if ratio >= least and (numbers["requests_ratio"]["low"] or ratio) > 1:
        return Conclusion(here, "yes")
    tpot = {run["policy"]: run["p50_tpot_s"] for run in numbers["runs"] if run["rate_fraction"] == _busiest(numbers)}
    reason = f"among up to {batches['partial']} sequences a token takes {tpot[EMOE] / tpot[ALL_FCFS]:.1f} times as long"
    return Conclusion(here, "partly" if ratio > 1 else "no", reason)


def _busiest(numbers: Numbers) -> float:
    return max(run["rate_fraction"] for run in numbers["runs"])


def plot(numbers: Numbers, figure: Any) -> None:
    """Mean latency by arrival rate."""
    axis = figure.subplots()
    for name, by_rate in _latencies(numbers).items():
        rates = sorted(by_rate)
        axis.plot([100 * rate for rate in rates], [by_rate[rate] for rate in rates], marker=".", label=name)
    axis.set(xlabel="arrival rate, % of what all resident can serve", ylabel="mean latency, s", yscale="log")
    axis.legend()


def plot_throughput(numbers: Numbers, figure: Any) -> None:
    """Requests per second with more users than places."""
    axis = figure.subplots()
    saturated = numbers["saturated"]
    axis.barh([*saturated], [of["throughput_rps"] for of in saturated.values()])
    axis.set(xlabel="requests/s, closed loop")


CLAIMS = (
    Claim(
        "fig12",
        "end-to-end latency by arrival rate, against all resident",
        "9 % (smallest model) to 17 % (largest) lower",
        "live",
        _COMMAND,
        measured,
        by_rate,
        plot,
    ),
    Claim(
        "fig18-throughput",
        "throughput at the larger batch",
        "1.3x to 1.5x at 2x to 4.5x the batch",
        "live",
        _COMMAND,
        measured,
        throughput,
        plot_throughput,
    ),
    Claim("headline-throughput", "throughput", "1.5x higher", "live", _COMMAND, measured, highest),
    Claim("headline-latency", "inference latency", "up to 17 % lower", "live", _COMMAND, measured, latency),
)
