"""Correlations and coverage by hand, and the command from file to files."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.figures import measures
from benchmarks.figures.__main__ import main
from emoe_jax.policies.learning import co_occurrences
from emoe_jax.traces import RoutingTrace
from tests.traces.synthetic import make_trace


def trace_of(experts: list[list[int]], prompts: list[int], num_experts: int, tasks: list[int]) -> RoutingTrace:
    """Tokens with one expert per layer."""
    chosen = np.array(experts, np.uint8)[:, :, None]
    return RoutingTrace(
        chosen,
        np.ones(chosen.shape, np.float16),
        np.array(prompts, np.int32),
        np.arange(len(prompts), dtype=np.int32),
        np.array(tasks, np.int16),
        ("a", "b"),
        num_experts,
    )


def test_co_occurrences_count_tokens():
    trace = make_trace(prompts=4)
    together = co_occurrences(trace.experts[:, 0], trace.experts[:, 1], 8)
    first, second = ((trace.experts[:, layer, :, None] == np.arange(8)).any(1) for layer in (0, 1))
    np.testing.assert_array_equal(together, first.T.astype(int) @ second)


def test_layers_that_follow_each_other_correlate_and_others_do_not():
    # Layer 1 is a renumbering of layer 0; layer 2 goes its own way, every pair of experts once.
    experts = [[i % 3, (i + 1) % 3, i // 3] for i in range(9)]
    numbers = measures.between_layers(trace_of(experts, [0] * 9, 3, [0]))
    assert numbers["by_layer"] == pytest.approx([1, 0], abs=1e-9)
    assert numbers["mean"] == pytest.approx(0.5)


def test_the_strongest_follower_by_numpy():
    trace = make_trace(prompts=6)
    chosen = (trace.experts[..., None] == np.arange(8)).any(2).astype(float)  # [tokens, M, E]
    phi = np.corrcoef(chosen[:, 0].T, chosen[:, 1].T)[:8, 8:]
    expected = np.average(phi.max(1), weights=chosen[:, 0].sum(0))
    numbers = measures.between_layers(trace)
    assert numbers["by_layer"][0] == pytest.approx(expected)
    assert 0 < numbers["by_chance"] < numbers["mean"]


def test_a_layer_that_always_chooses_the_same_expert_is_left_out():
    numbers = measures.between_layers(trace_of([[0, 0, 0], [0, 1, 1]], [0, 0], 2, [0]))
    assert numbers["by_layer"] == [None, pytest.approx(1)]
    assert numbers["mean"] == pytest.approx(1)


def test_prompts_by_hand():
    # Shares of three experts: (1, 0, 0), (0, 1, 0), (1, 0, 0), (1/2, 0, 1/2). Of distinct unit vectors r is -1/2,
    # of (1, 0, 0) with (1/2, 0, 1/2) it is 1/2.
    trace = trace_of([[0], [1], [0], [0], [2]], [0, 1, 2, 3, 3], 3, [0, 1, 0, 0])
    numbers = measures.between_prompts(trace, (1, 2, 3, 4))
    next_one = numbers["consecutive"]
    assert next_one["mean"] == pytest.approx((-0.5 - 0.5 + 0.5) / 3)
    assert next_one["by_layer"] == pytest.approx([next_one["mean"]])
    assert (next_one["same_task"], next_one["other_task"]) == pytest.approx((0.5, -0.5))
    assert list(numbers["by_distance"]) == ["1", "2", "3"]
    assert numbers["by_distance"]["2"] == pytest.approx((1 - 1) / 2, abs=1e-6)  # (0, 1, 0) with (1/2, 0, 1/2) is -1
    assert numbers["by_distance"]["3"] == pytest.approx(0.5)


def test_correlations_of_prompts_by_numpy():
    trace = make_trace(prompts=9)
    counts = trace.counts()
    numbers = measures.between_prompts(trace, (1, 5))
    for distance, correlation in numbers["by_distance"].items():
        i = int(distance)
        pairs = [np.corrcoef(counts[p, m], counts[p + i, m])[0, 1] for p in range(9 - i) for m in range(3)]
        assert correlation == pytest.approx(np.mean(pairs), abs=1e-5)
    assert numbers["by_distance"]["1"] == numbers["consecutive"]["mean"]
    assert numbers["consecutive"]["beyond_mean"] < numbers["consecutive"]["mean"]


def test_coverage_by_hand():
    # One slot: prompt 0 keeps expert 0, which serves 2 of 3 of its own tokens, 1 of 2 of the next prompt's and none of
    # the last one's; prompt 1 keeps 0 (a tie), which serves none of the last one's.
    trace = trace_of([[0], [0], [1], [0], [1], [2]], [0, 0, 0, 1, 1, 2], 3, [0, 0, 0])
    curve = measures.served_by_one(trace, [1 / 3], longest=80)
    assert curve["longest"] == 2
    covered = curve["coverage"]["0.333333"]
    assert covered == pytest.approx({"0": (2 + 1 + 1) / 6, "1": (1 + 0) / (2 + 1), "2": (1 + 0) / (2 + 1)})
    assert set(measures.served_by_one(trace, [1.0], longest=1)["coverage"]["1"].values()) == {1.0}


def test_from_file_to_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    trace, out, plots = tmp_path / "trace.npz", tmp_path / "out.json", tmp_path / "plots"
    make_trace(prompts=30).save(trace)
    assert main(["--trace", str(trace), "--json", str(out), "--plots", str(plots), "--longest", "12"]) == 0
    numbers = json.loads(out.read_text())
    assert list(numbers["transitions"]) == ["0", "1"]
    np.testing.assert_allclose(np.sum(numbers["transitions"]["0"], axis=1), 2, atol=2e-3)
    assert len(numbers["between_layers"]["by_layer"]) == 2
    assert list(numbers["between_prompts"]["by_distance"]) == [str(i) for i in range(1, 21)]
    assert list(numbers["served_by_one"]["coverage"]["0.5"]) == [str(p) for p in range(13)]
    assert {path.name for path in plots.iterdir()} == {"transitions.png", "correlations.png", "served_by_one.png"}
    assert all(path.stat().st_size > 10_000 for path in plots.iterdir())
    assert "consecutive layers (fig. 7)" in capsys.readouterr().out


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    trace, flat = tmp_path / "trace.npz", tmp_path / "flat.npz"
    make_trace(prompts=3).save(trace)
    make_trace(prompts=3, layers=1).save(flat)
    lonely = make_trace(prompts=1)
    dataclasses.replace(lonely, task=np.zeros(5, np.int16), prompt_embedding=None).save(tmp_path / "lonely.npz")
    for options, message in (
        (["missing.npz"], "missing.npz: no such trace file"),
        ([str(flat)], "1 MoE layers and 3 prompts with routing; figures need two of each"),
        ([str(tmp_path / "lonely.npz")], "3 MoE layers and 1 prompts with routing"),
        ([str(trace), "--layers", "2"], "--layers names 2; MoE layers with one behind them are 0 to 1"),
    ):
        assert main(["--trace", *options]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    for options in (["--shares", "0"], ["--longest", "0"], ["--seed", "-1"]):
        with pytest.raises(SystemExit):
            main(["--trace", str(trace), *options])
