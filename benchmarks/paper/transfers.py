"""Figures 1, 2 and 16: waiting for experts, fetching them ahead, and having them, by batch."""

from __future__ import annotations

from typing import Any

from benchmarks.paper.bench import ENGINE, SHARE, Bench
from benchmarks.paper.claim import Claim, Conclusion, Numbers
from benchmarks.transfers.measure import Settings, measure

_COMMAND = "python -m benchmarks.transfers --link-gbps 0.25"
_BATCH = 4
"""Sequences side by side where one number stands for a mode."""


def measured(bench: Bench) -> Numbers:
    """A row per mode, link and batch."""
    settings = Settings(
        bench.model,
        batches=bench.sizes.batches,
        share=SHARE,
        link_gbps=bench.link_gbps,
        repeats=bench.sizes.repeats,
        steps=bench.sizes.steps,
        seed=bench.seed,
    )
    parameters = settings._asdict() | {"model": None}  # its content tells results apart, not where it lies
    code = (*ENGINE, "benchmarks/transfers", "benchmarks/quality", "benchmarks/timing.py")
    return bench.kept("transfers", parameters, code, lambda: measure(settings, bench.report))


def _by_batch(numbers: Numbers, mode: str, value: str) -> dict[int, float]:
    """A value of a mode by batch, over the modelled link where the mode loads anything."""
    link = "machine" if mode == "all" else "modelled"
    rows = [row for row in numbers["rows"] if (row["mode"], row["link"]) == (mode, link)]
    return {row["batch"]: row[value] for row in rows}


def _batch(numbers: Numbers) -> int:
    """The measured batch that is nearest to `_BATCH`."""
    return min((row["batch"] for row in numbers["rows"]), key=lambda batch: abs(batch - _BATCH))


def _at(numbers: Numbers, mode: str, value: str, link: str | None = None) -> float:
    """A value of a mode at that batch."""
    link = link or ("machine" if mode == "all" else "modelled")
    at = (mode, link, _batch(numbers))
    (row,) = [row for row in numbers["rows"] if (row["mode"], row["link"], row["batch"]) == at]
    return row[value]


def latency(numbers: Numbers) -> Conclusion:
    """On demand: 3.2 and 5 times slower, 1.4 and 1.5 times less memory, 67 and 78 % of experts active."""
    full = _at(numbers, "all", "request_seconds")
    slower = _at(numbers, "on-demand", "request_seconds") / full
    unmodelled = _at(numbers, "on-demand", "request_seconds", "machine") / full
    memory = _at(numbers, "all", "expert_bytes") / _at(numbers, "on-demand", "expert_bytes")
    active = numbers["active"][str(_batch(numbers))]["per_prompt"]
    here = (
        f"on demand {slower:.1f}x slower ({unmodelled:.1f}x over this machine's own link), {memory:.1f}x less expert "
        f"memory; a prompt uses {active:.0%} of the experts"
    )
    if slower >= 3.2:
        return Conclusion(here, "yes")
    transfer, compute = (_at(numbers, "on-demand", f"{part}_seconds") for part in ("transfer", "compute"))
    reason = (
        f"a request's transfers take {transfer / compute:.1f} times its computing, which bounds what waiting can cost"
    )
    return Conclusion(here, "partly" if slower >= 1.5 else "no", reason)


def transfer(numbers: Numbers) -> Conclusion:
    """Transfers take 2.2 and 3.6 times as long as computing. The link is ours to choose, so that this is no proof."""
    ratio = _at(numbers, "on-demand", "transfer_seconds") / _at(numbers, "all", "compute_seconds")
    own = _at(numbers, "on-demand", "transfer_seconds", "machine") / _at(numbers, "all", "compute_seconds")
    loads = _at(numbers, "on-demand", "loads")
    here = (
        f"{ratio:.1f}x the time of computing over the modelled link, {own:.1f}x over this machine's own ({loads:.0f} "
        f"loads for {_batch(numbers)} requests)"
    )
    if own >= 2.2:
        return Conclusion(here, "yes")
    if ratio >= 1:
        return Conclusion(here, "partly", "the ratio follows from the bandwidth of the modelled link, which was chosen")
    return Conclusion(here, "no", "the transfers of a request take less time than its computing")


def prefetch(numbers: Numbers) -> Conclusion:
    """Pre-gated: 1.2 to 1.6 times faster than on demand, 2.5 to 3.5 times slower than resident and eMoE."""
    ahead = _at(numbers, "pre-gated", "request_seconds")
    faster = _at(numbers, "on-demand", "request_seconds") / ahead
    slower = {mode: ahead / _at(numbers, mode, "request_seconds") for mode in ("all", "emoe")}
    spared = _at(numbers, "pre-gated", "spared_share") or 0.0
    here = (
        f"{faster:.2f}x faster than on demand ({spared:.0%} of the misses are spared), {slower['all']:.1f}x slower "
        f"than all resident, {slower['emoe']:.1f}x slower than eMoE"
    )
    statements = {
        "1.2 times faster than on demand": faster >= 1.2,
        "2.5 times slower than resident": slower["all"] >= 2.5,
        "2.5 times slower than eMoE": slower["emoe"] >= 2.5,
    }
    failed = [text for text, holds in statements.items() if not holds]
    if not failed:
        return Conclusion(here, "yes")
    reason = f"not here: {', '.join(failed)}"
    if faster < 1.2:
        reason += "; the loads of the next layer queue on the link behind those of this one"
    return Conclusion(here, "partly" if len(failed) < len(statements) else "no", reason)


def by_batch(numbers: Numbers) -> Conclusion:
    """eMoE as fast as resident at every batch; the others slower."""
    full = _by_batch(numbers, "all", "request_seconds")
    ratios = {
        mode: {batch: seconds / full[batch] for batch, seconds in _by_batch(numbers, mode, "request_seconds").items()}
        for mode in ("emoe", "emoe-e", "pre-gated", "infinity", "on-demand")
    }
    here = "times all resident: " + "; ".join(
        f"{mode} {min(by.values()):.2f} to {max(by.values()):.2f}" for mode, by in ratios.items()
    )
    statements = {
        "eMoE within 10 % of resident": max(ratios["emoe"].values()) <= 1.1,
        "Pre-gated 2.4 times": max(ratios["pre-gated"].values()) >= 2.4,
        "MoE-Infinity 1.25 times": max(ratios["infinity"].values()) >= 1.25,
        "eMoE-E slower than eMoE": sum(ratios["emoe-e"].values()) > sum(ratios["emoe"].values()),
    }
    failed = [text for text, holds in statements.items() if not holds]
    if not failed:
        return Conclusion(here, "yes")
    reason = f"not here: {', '.join(failed)}"
    return Conclusion(here, "partly" if len(failed) < len(statements) else "no", reason)


def plot_latency(numbers: Numbers, figure: Any) -> None:
    """Bars of every mode at one batch, with the machine's own link beside the modelled one."""
    axis = figure.subplots()
    rows = [row for row in numbers["rows"] if row["batch"] == _batch(numbers)]
    for offset, link in ((-0.2, "modelled"), (0.2, "machine")):
        some = [row for row in rows if row["link"] == link]
        places = [sorted({row["mode"] for row in rows}).index(row["mode"]) + offset for row in some]
        axis.bar(places, [row["request_seconds"] for row in some], 0.38, label=f"{link} link")
    axis.set_xticks(range(len({row["mode"] for row in rows})), sorted({row["mode"] for row in rows}))
    axis.set(ylabel="seconds of a request")
    axis.legend()


def plot_by_batch(numbers: Numbers, figure: Any) -> None:
    """Seconds of a request by batch."""
    axis = figure.subplots()
    for mode in dict.fromkeys(row["mode"] for row in numbers["rows"]):
        curve = _by_batch(numbers, mode, "request_seconds")
        axis.plot([*curve], [*curve.values()], marker=".", label=mode)
    axis.set_xscale("log", base=2)
    axis.set(xlabel="batch", ylabel="seconds of a request", yscale="log")
    axis.legend()


CLAIMS = (
    Claim(
        "fig1-latency",
        "on-demand loading against all resident",
        "3.2x (OpenMoE) and 5x (Mixtral) slower; memory 1.5x and 1.4x lower; 67 % and 78 % of experts active",
        "modelled link",
        _COMMAND,
        measured,
        latency,
        plot_latency,
    ),
    Claim(
        "fig1-transfer",
        "time of expert transfers against computing",
        "2.2x (OpenMoE), 3.6x (Mixtral)",
        "modelled link",
        _COMMAND,
        measured,
        transfer,
    ),
    Claim(
        "fig2",
        "prefetch in the loop (Pre-gated MoE)",
        "1.2x to 1.6x faster than on demand, 2.5x to 3.5x slower than resident and eMoE",
        "modelled link",
        _COMMAND,
        measured,
        prefetch,
    ),
    Claim(
        "fig16",
        "inference time by batch",
        "eMoE = resident; Pre-gated 2.4x to 3.5x; MoE-Infinity 1.25x to 1.5x; eMoE-E 9 to 34 % slower",
        "modelled link",
        _COMMAND,
        measured,
        by_batch,
        plot_by_batch,
    ),
)
