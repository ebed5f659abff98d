"""Runs that differ only in their seed, as means and 95 % intervals."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy import stats

from emoe_jax.scheduling.registry import VARIANTS

CONFIDENCE = 0.95
MEASURES = ("slo_attainment", "mean_latency_s", "p99_latency_s", "p50_ttft_s", "max_wait_s", "capacity_rps")
RATIOS = ("mean_latency_s", "p99_latency_s", "p50_ttft_s")
Run = dict[str, Any]


def interval(values: Sequence[float]) -> dict[str, float | None]:
    """`mean`, and `low` and `high` of Student's t; these are None for a single value."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return {"mean": mean, "low": None, "high": None}
    half = stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * stats.sem(values)
    return {"mean": mean, "low": mean - half, "high": mean + half}


def ratio_interval(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float | None]:
    """The interval of ours over theirs, pair by pair, by their logarithms: a ratio and its inverse mean the same."""
    logs = interval([float(np.log(one / other)) for one, other in zip(ours, theirs, strict=True)])
    return {key: None if value is None else float(np.exp(value)) for key, value in logs.items()}


def over_seeds(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A row per setting, rate and policy: the interval of each measure."""
    return [
        {**_described(group[0]), "seeds": len(group)}
        | {name: interval([run[name] for run in group]) for name in MEASURES if group[0].get(name) is not None}
        for group in _grouped(runs, lambda run: tuple(_described(run).values()))
    ]


def differences(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A row per setting, rate and policy against another, which saw the same requests: `fcfs`, or for a policy that
    lacks a part, `slo`. `slo_attainment` is the difference as a share of requests, the rest are ratios. Each is the
    interval of what was found seed by seed; ratios by their logarithm.
    """
    rows = []
    for group in _grouped(runs, lambda run: tuple(_described(run).values())):
        against = "slo" if group[0]["policy"] in VARIANTS else "fcfs"
        others = {_key(run): run for run in runs if run["policy"] == against}
        if against == group[0]["policy"] or not all(_key(run) in others for run in group):
            continue
        pairs = [(run, others[_key(run)]) for run in group]
        row = {**_described(group[0]), "against": against, "seeds": len(pairs)}
        row["slo_attainment"] = interval([ours["slo_attainment"] - theirs["slo_attainment"] for ours, theirs in pairs])
        for name in RATIOS:
            ours, theirs = ([run[name] for run in runs] for runs in zip(*pairs, strict=True))
            row[f"{name.removesuffix('_s')}_ratio"] = ratio_interval(ours, theirs)
        rows.append(row)
    return rows


def _described(run: Run) -> dict[str, Any]:
    return {key: run.get(key) for key in ("residency", "routing", "rate_fraction", "policy")}


def _key(run: Run) -> tuple[Any, ...]:
    return tuple(run.get(key) for key in ("residency", "routing", "rate_fraction", "seed"))


def _grouped(runs: Sequence[Run], key: Callable[[Run], tuple[Any, ...]]) -> list[list[Run]]:
    groups: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    return list(groups.values())
