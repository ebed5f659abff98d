"""Runs over seeds: their settings, their intervals, and what is compared with what."""

import math
from typing import Any

import numpy as np
import pytest

from benchmarks.serving.intervals import differences, interval, over_seeds
from benchmarks.serving.settings import Setting, settings_of


def run(policy: str, seed: int, attained: float, latency: float, **where: Any) -> dict[str, Any]:
    numbers = {"slo_attainment": attained, "mean_latency_s": latency, "p99_latency_s": 2 * latency}
    return {"residency": "40%", "routing": "exact", "rate_fraction": 0.9, "policy": policy, "seed": seed} | where | {
        **numbers, "p50_ttft_s": 0.1, "max_wait_s": None, "capacity_rps": 5.0
    }  # fmt: skip


def test_intervals_by_hand():
    assert interval([0.5]) == {"mean": 0.5, "low": None, "high": None}
    found = interval([1.0, 3.0])  # t of one degree of freedom is 12.706; the error of the mean is 1
    assert found == pytest.approx({"mean": 2.0, "low": 2 - 12.7062, "high": 2 + 12.7062}, rel=1e-5)


def test_an_interval_holds_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    found = [interval(rng.normal(3.0, 2.0, 6).tolist()) for _ in range(2000)]
    held = np.mean([of["low"] <= 3.0 <= of["high"] for of in found])  # pyright: ignore
    assert held == pytest.approx(0.95, abs=0.015)


def test_rows_are_of_a_setting_a_rate_and_a_policy():
    runs = [run(policy, seed, 0.5 + 0.1 * seed, 1.0) for seed in (0, 1) for policy in ("fcfs", "slo")]
    runs += [run("slo", 0, 0.9, 1.0, residency="100%"), run("slo", 0, 0.7, 1.0, rate_fraction=0.5)]
    rows = over_seeds(runs)
    assert [(row["residency"], row["rate_fraction"], row["policy"], row["seeds"]) for row in rows] == [
        ("40%", 0.9, "fcfs", 2),
        ("40%", 0.9, "slo", 2),
        ("100%", 0.9, "slo", 1),
        ("40%", 0.5, "slo", 1),
    ]
    assert rows[0]["slo_attainment"]["mean"] == pytest.approx(0.55)
    assert "max_wait_s" not in rows[0]


def test_differences_are_of_the_same_requests():
    """Seeds differ far more than policies do: only pairs tell these apart."""
    runs = []
    for seed, hard in enumerate((1.0, 5.0, 20.0)):
        runs.append(run("fcfs", seed, 1 / (1 + hard), hard))
        runs.append(run("slo", seed, 1 / (1 + hard) + 0.1, 0.5 * hard))
        runs.append(run("slo-without-dE", seed, 1 / (1 + hard) + 0.08, 0.55 * hard))
    rows = {row["policy"]: row for row in differences(runs)}
    assert {name: row["against"] for name, row in rows.items()} == {"slo": "fcfs", "slo-without-dE": "slo"}
    for name, gain, ratio in (("slo", 0.1, 0.5), ("slo-without-dE", -0.02, 1.1)):
        assert rows[name]["slo_attainment"] == pytest.approx({"mean": gain, "low": gain, "high": gain})
        assert rows[name]["mean_latency_ratio"] == pytest.approx({"mean": ratio, "low": ratio, "high": ratio})
    assert differences([row for row in runs if row["policy"] != "fcfs"])[0]["policy"] == "slo-without-dE"
    assert differences([run("slo", 0, 0.5, 1.0), run("fcfs", 0, 0.5, 2.0)])[0]["mean_latency_ratio"] == {
        "mean": math.exp(math.log(0.5)),
        "low": None,
        "high": None,
    }


@pytest.mark.parametrize(
    ("residencies", "contracts", "settings"),
    [
        (None, None, [(None, None)]),
        (["40%"], None, [("40%", None)]),
        (None, ["exact"], [(None, "exact")]),
        (["100%", "40%"], ["resident", "exact"], [("100%", "resident"), ("40%", "resident"), ("40%", "exact")]),
    ],
)
def test_settings_are_all_pairs_that_differ(residencies: Any, contracts: Any, settings: list[tuple[Any, Any]]):
    assert settings_of(residencies, contracts) == settings


def test_a_server_is_told_its_setting():
    assert Setting().server_arguments == []
    assert Setting("40%", "exact").server_arguments == ["--expert-memory", "40%", "--routing", "exact"]
