"""Every benchmark that runs an engine or a server does so once, on a tiny model: that it measures, not how much."""

import asyncio
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from benchmarks import loading, peers, recording
from benchmarks.residency import __main__ as residency
from benchmarks.residency import live
from benchmarks.serving import live as serving
from benchmarks.soak import soak
from tests.benchmarks.serving_samples import SAMPLES
from tests.serve.checkpoint import write_tiny_checkpoint
from tests.serve.resident import needs_proc

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights whose tokenizer knows numbers only: a word is a token, so that prompts are short."""
    directory = tmp_path_factory.mktemp("measured") / "tiny"
    write_tiny_checkpoint(directory)
    words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "?": 2} | {str(n): n + 3 for n in range(297)}, "?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(directory / "tokenizer.json"))
    return directory


@pytest.mark.filterwarnings("ignore")  # what torch and transformers deprecate is theirs
def test_peers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch", reason="needs the parity extra")
    monkeypatch.setattr(peers, "MODEL", peers.MODEL | TINY)
    monkeypatch.setattr(peers, "PREFILL", 48)
    monkeypatch.setattr(peers, "_SETTLE", 0.01)
    monkeypatch.setattr(peers.os, "sched_setaffinity", lambda *_: None, raising=False)
    assert peers.main(["--repetitions", "2", "--json", str(tmp_path / "out.json")]) == 0
    numbers = json.loads((tmp_path / "out.json").read_text())
    for name, tokens in (("decode_b1", 1), ("decode_b8", 8), ("prefill_48", 48)):
        ours, theirs = numbers[f"{name}_ours_s"], numbers[f"{name}_theirs_s"]
        assert min(ours, theirs) > 0
        assert numbers[name] == pytest.approx(theirs / ours)
        assert numbers[f"{name}_ours_tokens_per_s"] == pytest.approx(tokens / ours)
    assert numbers["decode_b1_same_tokens"] > 0.9  # both compute the same model
    assert numbers["slab_overhead"] == pytest.approx(numbers["slab_step_s"] / numbers["plain_step_s"] - 1)


def test_recording(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "BATCHES", (1, 3))
    out = tmp_path / "out.json"
    assert recording.main(["--model", str(model), "--pairs", "2", "--steps", "12", "--json", str(out)]) == 0
    numbers = json.loads(out.read_text())
    assert list(numbers["batches"]) == ["1", "3"]
    for row in numbers["batches"].values():
        assert min(row["plain_step_s"], row["recording_step_s"]) > 0
        assert row["overhead"] > -1
        assert row["cpu_overhead"] > -1


@needs_proc
def test_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(loading, "MODEL", loading.MODEL | {"hidden_size": 128, "intermediate_size": 256})
    loading.main(["--rounds", "2", "--json", str(tmp_path / "out.json")])
    numbers = json.loads((tmp_path / "out.json").read_text())
    assert numbers["expert_bytes"] == 3 * 128 * 256 * 4
    for name in ("stage_commit_fraction", "from_file_fraction", "commit_scaling"):
        assert 0 < numbers[name] < math.inf
    assert [probe["budget"] for probe in numbers["peak_rss"]] == ["50%", "100%"]
    assert [probe["slab_bytes"] / probe["expert_bytes"] for probe in numbers["peak_rss"]] == [0.5, 1.0]
    assert "commit of one 6 MB expert, 128 slots" in capsys.readouterr().out


def test_live_residency(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"BATCHES": (1, 2), "_ANSWER_TOKENS": 6, "_DECODE_STEPS": 8, "_SWITCH_PROMPTS": 6, "_CONTEXT": 128}
    for name, value in sizes.items():
        monkeypatch.setattr(live, name, value)
    out = tmp_path / "out.json"
    options = ["--live", str(model), "--shares", "0.5", "--live-policies", "emoe", "--json", str(out)]
    residency.main([*options, "--per-task", "2", "--repetitions", "2"])
    results = json.loads(out.read_text())
    full, half = results["live_policies"]["full"]["1"], results["live"]["0.5"]
    assert (full["substituted"], full["coverage"]) == (0, 1)
    assert 0 < half["substituted"] < 1
    assert 0 < half["coverage"] < 1
    assert half["slots"] == [4]
    assert half["perplexity_ratio"] == pytest.approx(half["perplexity"] / full["perplexity"])
    assert set(full["exact_match"]) == set(live.EXACT_TASKS)
    assert min(half["decode_ratio_b1"], half["decode_ratio_b2"], half["answer_tokens_per_second"]) > 0
    assert all(0 <= half[name] < 1 for name in ("planning_share", "prediction_share", "commit_share"))
    switch = results["topic_switch"]
    assert len(switch["coverage_by_prompt"]) == 12
    assert 0 < switch["steady_coverage"] < 1


LOAD = serving.Traffic(SAMPLES, fractions=(0.5,), requests=8, concurrency=2, max_tokens=6, turns=2)


@pytest.fixture(scope="module")
def url(model: Path) -> Iterator[str]:
    """A real server of the tiny model."""
    arguments = ["--model", str(model), "--expert-memory", "50%", "--max-model-len", "256"]
    with serving.servers_of(("slo",), [*arguments, "--max-num-batched-tokens", "32"], LOAD, print) as (url,):
        yield url


def test_serving(url: str) -> None:
    report: list[str] = []
    results = serving.run_live([url], LOAD, report.append)
    (run,) = results["runs"]
    assert (run["policy"], run["rate_fraction"], run["requests"]) == ("slo", 0.5, 8)
    assert run["throughput_rps"] > 0
    assert 0 < run["p50_ttft_s"] <= run["p50_latency_s"] <= run["p99_latency_s"]
    assert results["capacity_rps"] == results["capacity_rps_each"]["slo"] > 0
    assert all(0 < slo["ttft_ms"] <= slo["latency_ms"] for slo in results["slos"].values())
    assert len(report) == LOAD.turns


@needs_proc
def test_soak(url: str) -> None:
    report: dict[str, Any] = asyncio.run(soak(url, SAMPLES, 4 / 60, users=3, seed=0))
    assert report["errors"] == 0, report["first_errors"]
    assert sum(report["requests"].values()) >= 3
    assert report["compilations"] == 0
    assert report["rss_begin_mb"] > 10
    assert (report["running_left"], report["waiting_left"]) == (0, 0)
