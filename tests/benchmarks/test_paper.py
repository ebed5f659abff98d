"""What `benchmarks.paper` concludes from numbers, what it keeps, and what it says to bad input."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.paper import (
    arrivals,
    lengths,
    memory,
    misclassified,
    patterns,
    period,
    predictors,
    quantised,
    report,
    residents,
    sensitivity,
    transfers,
)
from benchmarks.paper.__main__ import main, parse
from benchmarks.paper.bench import Bench
from benchmarks.paper.claim import Claim, Conclusion, Row
from benchmarks.paper.claims import CLAIMS
from benchmarks.paper.sizes import QUICK

REPOSITORY = Path(__file__).resolve().parents[2]


def between(mean: float, chance: float = 0.1, any_pair: float = 0.1, beyond: float = 0.4) -> dict[str, Any]:
    consecutive = {"mean": mean, "by_layer": [mean], "beyond_mean": beyond}
    found = {"by_distance": {"1": mean}, "beyond_mean_by_distance": {"1": beyond}, "any_pair": any_pair}
    table = [[0.6, 0.1], [0.1, 0.6]]
    return {
        "transitions": {"0": table},
        "between_layers": {"mean": mean, "by_chance": chance, "by_layer": [mean]},
        "between_prompts": {"consecutive": consecutive, **found},
    }


def test_patterns_agree_only_where_they_are_in_the_papers_range() -> None:
    assert patterns.layers({"demo": between(0.5)}).agrees == "yes"
    assert patterns.layers({"demo": between(0.3)}).agrees == "partly"
    assert patterns.layers({"demo": between(0.12)}).agrees == "no"
    flat = between(0.5) | {"transitions": {"0": [[0.5, 0.5], [0.5, 0.5]]}}
    assert patterns.transitions({"demo": between(0.5)}).agrees == "yes"
    assert patterns.transitions({"demo": flat}).agrees == "no"
    assert patterns.transitions({"demo": flat, "other": between(0.5)}).agrees == "partly"


@pytest.mark.parametrize("conclude", [patterns.prompts, patterns.distances])
def test_prompts_that_are_alike_because_all_are_do_not_recur(conclude: Any) -> None:
    assert conclude({"demo": between(0.5)}).agrees == "yes"
    popular = conclude({"demo": between(0.5, any_pair=0.48, beyond=0.02)})
    assert popular.agrees == "partly"
    assert "any two prompts" in popular.because
    assert conclude({"demo": between(0.2)}).agrees == "no"
    assert conclude({"demo": between(0.2), "other": between(0.5)}).agrees == "partly"


def test_lengths() -> None:
    paper = {"qa": [2, 3, 4], "clsfy": [3, 4, 4], "comp": [3, 4, 4], "sum": [4, 5, 6], "conv": [6, 7, 8]}
    assert lengths.conclude(paper).agrees == "yes"
    assert lengths.conclude(paper | {"conv": [60, 70, 80]}).agrees == "partly"
    assert lengths.conclude(paper | {"conv": [3, 4, 5]}).agrees == "no"


def randomised(none: float, half: float, most: float) -> dict[str, Any]:
    curve = {"0": [none], "0.5": [half], "0.75": [most]}
    return {
        task: {share: [*of, 0.0, 1.0] for share, of in curve.items()} for task in ("clsfy", "comp", "qa", "sum", "conv")
    }


def test_sensitivity_counts_the_papers_statements() -> None:
    paper = randomised(0.95, 0.9, 0.7)
    paper["sum"] = {share: [0.6, 0.5, 0.7] for share in paper["sum"]}
    assert sensitivity.conclude_randomised(paper).agrees == "yes"
    assert sensitivity.conclude_randomised(randomised(0.5, 0.9, 0.95)).agrees == "partly"
    found = sensitivity.conclude_randomised(randomised(0.5, 0.9, 0.95))
    assert "CLSFY and COMP" in found.because


def test_task_aware_loading_must_be_better_beyond_its_interval() -> None:
    def tasks(values: dict[str, float]) -> dict[str, list[float]]:
        return {task: [mean, mean - 0.05, mean + 0.05] for task, mean in values.items()}

    agnostic = tasks({"sum": 0.3, "clsfy": 0.8, "qa": 0.5, "comp": 0.8, "conv": 0.2})
    aware = tasks({"sum": 0.5, "clsfy": 0.8, "qa": 0.7, "comp": 0.8, "conv": 0.4})
    assert sensitivity.conclude_loading({"task-aware": aware, "task-agnostic": agnostic}).agrees == "yes"
    assert sensitivity.conclude_loading({"task-aware": agnostic, "task-agnostic": agnostic}).agrees == "no"
    assert sensitivity.conclude_loading({"task-aware": agnostic, "task-agnostic": aware}).agrees == "no"


def curve(ratios: dict[int, float]) -> dict[str, Any]:
    return {
        str(p): {"perplexity_ratio": [r, r, r], "similarity": [0.5, 0.4, 0.6], "coverage": 0.5}
        for p, r in ratios.items()
    }


def test_a_period_is_flat_and_then_rises() -> None:
    engine = curve({1: 1.1})
    for ratios, agrees in (
        ({0: 1.0, 20: 1.02, 40: 1.05, 60: 1.3, 80: 1.5}, "yes"),
        ({0: 1.0, 20: 1.02, 40: 1.05, 60: 1.05}, "partly"),
        ({0: 1.0, 1: 1.5, 40: 1.6, 60: 1.7}, "no"),
    ):
        found = period.conclude({"paper's way": curve(ratios), "engine": engine})
        assert found.agrees == agrees
    assert "p = 1 on" in period.conclude({"paper's way": curve({0: 1.0, 1: 1.5}), "engine": engine}).because


def loaded(ours: float, requests: float = 1.6) -> dict[str, Any]:
    names = (arrivals.ALL_FCFS, arrivals.EMOE, arrivals.PART_FCFS, arrivals.ALL_SLO, arrivals.ON_DEMAND)
    runs = [
        {
            "policy": name,
            "rate_fraction": rate,
            "mean_latency_s": ours if name == arrivals.EMOE else 1.0,
            "p50_tpot_s": 1,
        }
        for rate in (0.7, 0.9)
        for name in names
    ]
    batches = {"full": 2, "partial": 9}
    latencies = {rate: {"mean": ours, "low": ours - 0.1, "high": ours + 0.1} for rate in ("0.7", "0.9")}
    ratio = {"mean": requests, "low": None, "high": None}
    return {
        "runs": runs,
        "mean_latency_ratios": latencies,
        "requests_ratio": ratio,
        "max_batch_ratio": 4.5,
        "batches": batches,
    }


def test_speed_is_compared_with_all_resident() -> None:
    assert arrivals.latency(loaded(0.8)).agrees == "yes"
    assert arrivals.latency(loaded(0.9)).agrees == "partly"
    assert "10 % lower at 70% (0.80x to 1.00x)" in arrivals.latency(loaded(0.9)).here
    assert arrivals.by_rate(loaded(0.905)).agrees == "partly"  # its interval ends above 1
    assert arrivals.latency(loaded(1.2)).agrees == "no"
    assert arrivals.by_rate(loaded(0.88)).agrees == "yes"
    assert arrivals.by_rate(loaded(1.2)).agrees == "no"
    assert arrivals.throughput(loaded(1)).agrees == "yes"
    assert arrivals.throughput(loaded(1, 1.1)).agrees == "partly"
    assert arrivals.throughput(loaded(1, 0.9)).agrees == "no"
    assert arrivals.throughput(loaded(1, 1.4)).agrees == "yes"
    assert arrivals.highest(loaded(1, 1.4)).agrees == "partly"


def predictor_rows(xlnet: float, others: float) -> dict[str, Any]:
    def row(accuracy: float) -> dict[str, Any]:
        at_half = {metric: {"0.5": 0.7} for metric in ("precision", "recall", "f1")}
        return {"top_k_accuracy": accuracy, "given_earlier_layers": {"top_k_accuracy": accuracy}, **at_half}

    rows = {"prior alone": row(0.6)}
    for arch in ("xlnet", "gpt2", "bert"):
        for variant in ("layer-by-layer", "all-layer"):
            rows[f"{arch}, {variant}"] = row(xlnet if arch == "xlnet" else others)
    return {"demo": {"rows": rows}}


def test_predictors_are_compared_with_table_2() -> None:
    assert predictors.conclude_accuracy(predictor_rows(0.75, 0.5)).agrees == "yes"
    assert predictors.conclude_accuracy(predictor_rows(0.6, 0.5)).agrees == "partly"
    assert predictors.conclude_accuracy(predictor_rows(0.5, 0.6)).agrees == "no"
    alike = predictors.conclude_accuracy(predictor_rows(0.75, 0.75))
    assert (alike.agrees, "closed-form" in alike.because) == ("partly", True)


def test_the_cost_of_predictions_at_p_40() -> None:
    def numbers(share: float) -> dict[str, Any]:
        return {"40": {"calls": 3, "predict_seconds": 0.1, "load_seconds": 0.2, "share": share, "step_seconds": 1.0}}

    assert predictors.conclude_cost(numbers(0.02)).agrees == "yes"
    assert predictors.conclude_cost(numbers(0.2)).agrees == "no"


def resident_numbers(emoe: float, paper: float, every: float, random: float, saved: float = 0.8) -> dict[str, Any]:
    def of(mean: float) -> dict[str, list[float]]:
        return {share: [mean, mean - 0.02, mean + 0.02] for share in ("0.6", "0.2")}

    similarity = dict(zip(residents.POLICIES, map(of, (emoe, paper, every, 0.5, random)), strict=True))
    memory_ = {share: {"experts_saved": saved, "device_saved": saved / 2} for share in ("0.6", "0.2")}
    return {"similarity": similarity, "memory": memory_, "substituted": {"0.6": 0.3, "0.2": 0.6}}


def test_residents() -> None:
    assert residents.accuracy(resident_numbers(0.98, 0.9, 0.95, 0.9)).agrees == "yes"
    assert residents.accuracy(resident_numbers(0.7, 0.6, 0.65, 0.5)).agrees == "no"
    assert residents.rivals(resident_numbers(0.98, 0.9, 0.95, 0.9)).agrees == "yes"
    assert residents.rivals(resident_numbers(0.9, 0.9, 0.95, 0.9)).agrees == "partly"
    assert residents.rivals(resident_numbers(0.9, 0.9, 0.85, 0.9)).agrees == "no"
    assert residents.headline(resident_numbers(0.98, 0.9, 0.95, 0.9)).agrees == "yes"
    assert residents.headline(resident_numbers(0.4, 0.9, 0.95, 0.9)).agrees == "partly"
    assert residents.headline(resident_numbers(0.4, 0.9, 0.95, 0.9, saved=0.5)).agrees == "no"


def room(prompts: float, batches: float) -> dict[str, Any]:
    found = {
        "0.6": {"memory": 60e9, "same_memory": {"prompt_ratio": prompts, "batch_ratio": batches, "largest_batch": 9}},
        "1": {"memory": 96e9},
    }
    return {name: {"needs": found, "step_bytes": 10**9} for name in memory.MODELS}


def test_room_in_equal_memory() -> None:
    assert memory.prompts(room(50, 5)).agrees == "yes"
    assert memory.prompts(room(20, 5)).agrees == "partly"
    assert memory.prompts(room(2, 5)).agrees == "no"
    assert memory.batches(room(50, 5)).agrees == "yes"
    assert memory.batches(room(50, 1)).agrees == "no"
    assert memory.longest(room(39, 5)).agrees == "no"
    assert memory.largest(room(39, 4.5)).agrees == "yes"
    assert "97.0 GB -> 61.0 GB" in memory.prompts(room(50, 5)).here


def test_misclassified_requests() -> None:
    def numbers(*latencies: float) -> dict[str, Any]:
        shares = ("0", "0.2", "1")
        return {
            share: {"latency": latency, "similarity": [0.5, 0.4, 0.6]}
            for share, latency in zip(shares, latencies, strict=True)
        }

    assert misclassified.conclude(numbers(1, 1.05, 1.08)).agrees == "yes"
    assert misclassified.conclude(numbers(1, 1.05, 1.5)).agrees == "partly"
    assert misclassified.conclude(numbers(1, 1.3, 1.5)).agrees == "no"


def test_quantised() -> None:
    def numbers(ours: float) -> dict[str, Any]:
        alike = dict.fromkeys(("all experts, bf16", "all experts, int8", "all experts, int4", "emoe 40%, int8"), 0.9)
        return {
            name: {"bytes": 100, "similarity": [value, value, value]}
            for name, value in {**alike, "emoe 40%, bf16": ours}.items()
        }

    assert quantised.conclude(numbers(0.95)).agrees == "yes"
    assert quantised.conclude(numbers(0.5)).agrees == "no"


def transferred(ahead: float, on_demand: float, emoe: float = 1.0, emoe_e: float = 1.1, infinity: float = 1.4) -> Any:
    seconds = {
        "all": 1.0, "emoe": emoe, "emoe-e": emoe_e, "pre-gated": ahead, "infinity": infinity, "on-demand": on_demand,
    }  # fmt: skip
    rows = [
        {
            "mode": mode,
            "link": link,
            "batch": batch,
            "request_seconds": of,
            "expert_bytes": 100 if mode == "all" else 40,
            "transfer_seconds": max(of - 1, 0.1),
            "compute_seconds": 1.0,
            "spared_share": 0.3,
            "loads": 9,
        }
        for mode, of in seconds.items()
        for link in ("machine", "modelled")
        if (mode, link) != ("all", "modelled")
        for batch in (1, 4)
    ]
    return {"rows": rows, "active": {"1": {"per_prompt": 0.5}, "4": {"per_prompt": 0.7}}}


def test_ways_to_have_experts() -> None:
    paper = transferred(ahead=3.0, on_demand=4.0)
    assert [of(paper).agrees for of in (transfers.latency, transfers.transfer, transfers.prefetch)] == ["yes"] * 3
    assert transfers.by_batch(paper).agrees == "yes"
    assert "70%" in transfers.latency(paper).here
    fast = transferred(ahead=1.2, on_demand=1.2, emoe=1.3, emoe_e=1.2, infinity=1.1)
    assert [of(fast).agrees for of in (transfers.latency, transfers.transfer, transfers.prefetch)] == ["no"] * 3
    assert transfers.by_batch(fast).agrees == "no"
    slow_link = transferred(ahead=3.0, on_demand=4.0)
    for row in slow_link["rows"]:
        row["transfer_seconds"] *= 0.1 if row["link"] == "machine" else 1
    assert transfers.transfer(slow_link).agrees == "partly"
    assert "was chosen" in transfers.transfer(slow_link).because
    assert transfers.latency(transferred(ahead=2.0, on_demand=2.5)).agrees == "partly"
    assert transfers.prefetch(transferred(ahead=2.0, on_demand=2.5)).agrees == "partly"
    assert transfers.by_batch(transferred(ahead=1.5, on_demand=2.0)).agrees == "partly"


def test_the_readme_has_the_headlines_that_were_measured() -> None:
    """Made by the command that the file names; `report.markdown_table` of its headlines is what the README shows."""
    rows = json.loads((REPOSITORY / "docs" / "reproduction" / "rows.json").read_text())
    headlines = [row for row in rows["rows"] if row["id"].startswith(report.HEADLINE)]
    assert len(headlines) == 5
    table = report.markdown_table(headlines)
    assert table in (REPOSITORY / "README.md").read_text()
    assert table in (REPOSITORY / "docs" / "reproduction.md").read_text()
    assert not rows["quick"]
    assert [row["id"] for row in rows["rows"]] == [*CLAIMS]


def test_what_does_not_agree_needs_a_reason() -> None:
    with pytest.raises(ValueError, match="no reason"):
        Conclusion("3x", "no")


def stub(id: str, agrees: Any = "yes") -> Claim:
    def conclude(numbers: Any) -> Conclusion:
        return Conclusion(f"{numbers['x']:g} | as much", agrees, "" if agrees == "yes" else "it is less")

    def measure(bench: Bench) -> dict[str, Any]:
        return bench.kept(id, {}, [], lambda: {"x": 3.0})

    return Claim(id, "something", "2x", "live", "python -m benchmarks.timing", measure, conclude)


def test_the_command_writes_page_and_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "benchmarks.paper.__main__.CLAIMS", {"headline-x": stub("headline-x"), "fig99": stub("fig99", "no")}
    )
    out = tmp_path / "reproduction"
    assert main(["--quick", "--out", str(out), "--cache", str(tmp_path / "kept")]) == 0
    rows = json.loads((out / "rows.json").read_text())["rows"]
    assert [(row["id"], row["agrees"], row["because"]) for row in rows] == [
        ("headline-x", "yes", ""),
        ("fig99", "no", "it is less"),
    ]
    assert set(rows[0]) == {"id", "claim", "paper", "here", "how", "command", "agrees", "because", "seconds"}
    page = (tmp_path / "reproduction.md").read_text()
    assert page.index("## Headlines") < page.index("## Figures and tables")
    assert "3 \\| as much" in page
    assert "It is less." in page
    assert "fig99" in capsys.readouterr().out
    monkeypatch.setattr(
        "benchmarks.paper.__main__.CLAIMS", {"headline-x": stub("headline-x"), "fig99": stub("fig99", "partly")}
    )
    kept = ["--cache", str(tmp_path / "kept"), "--out", str(out)]
    for seed in ("1", "2"):  # what was measured before stays, and the page says which run each row is of
        assert main(["--quick", "--only", "fig99", "--seed", seed, *kept]) == 0
    found = json.loads((out / "rows.json").read_text())
    assert [(row["id"], row["agrees"]) for row in found["rows"]] == [("headline-x", "yes"), ("fig99", "partly")]
    assert (found["seed"], [(run["ids"], run["seed"]) for run in found["later"]]) == (0, [(["fig99"], 2)])
    assert "`fig99`: measured later, with seed 2" in (tmp_path / "reproduction.md").read_text()
    assert main(["--only", "fig99", "--json", str(tmp_path / "one.json"), "--cache", str(tmp_path / "kept")]) == 0
    assert [row["id"] for row in json.loads((tmp_path / "one.json").read_text())["rows"]] == ["fig99"]


def test_only_takes_a_figure_with_all_its_rows() -> None:
    assert [claim.id for claim in parse(["--only", "fig18"]).claims] == ["fig18-memory", "fig18-throughput"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--only", "fig6"], "--only names fig6; the rows are headline-memory"),
        (["--trace", "train.npz"], "a model's name, an equals sign, and a file"),
        (["--trace", "demo=train.npz"], "--trace names demo"),
        (["--seed", "-1"], "--seed is -1"),
        (["--link-gbps", "0"], "'0' is not a number above 0"),
    ],
)
def test_bad_options_are_refused_in_one_line(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert told in capsys.readouterr().err


def test_files_that_are_missing_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--trace", f"x={tmp_path / 'no.npz'}", "--cache", str(tmp_path)]) == 2
    assert "no.npz does not exist" in capsys.readouterr().err
    assert main(["--model", str(tmp_path / "no"), "--cache", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_sizes_of_a_quick_run_are_a_part_of_the_whole() -> None:
    from benchmarks.paper.sizes import FULL

    for name, few in QUICK._asdict().items():
        many = getattr(FULL, name)
        if isinstance(few, tuple):
            assert set(few) <= set(many)
        else:
            assert few <= many


def test_every_row_has_what_a_reader_needs() -> None:
    for claim in CLAIMS.values():
        assert claim.command.startswith("python -m ")
        assert all(dataclasses.asdict(claim)[name] for name in ("id", "claim", "paper", "how"))
    assert report.markdown_table([Row(stub("a"), {}, Conclusion("x", "yes"), 0.0).as_json()]).count("\n") == 2
