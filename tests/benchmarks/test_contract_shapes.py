"""`benchmarks.contracts --shapes`: seconds of steps made by hand, and prompts that run side by side."""

import numpy as np
import pytest

from benchmarks.contracts.replay import replay
from benchmarks.contracts.shapes import Shapes, first_choices, modelled, scaled_link_gbps
from benchmarks.contracts.steps import Steps, replay_steps, side_by_side
from emoe_jax.traces import RoutingTrace
from tests.traces.synthetic import make_trace

LOAD = 2 * 3 * 4096 * 14336 / 25e9
"""Seconds of one expert of Mixtral-8x7B in bfloat16 over 25 GB/s."""
READ = 2 * 3 * 4096 * 14336 / (0.7 * 2039e9)
"""The same in the memory of an A100, of whose rates 70 % are reached."""


@pytest.fixture(scope="module")
def mixtral() -> Shapes:
    return Shapes.of("mixtral-8x7b", "a100-80gb", 25.0)


def trace_of(prompts: list[list[list[int]]], probs: list[float], experts: int = 4) -> RoutingTrace:
    """One layer: the experts that each token of each prompt chooses, with these weights."""
    tokens = [chosen for prompt in prompts for chosen in prompt]
    lengths = [len(prompt) for prompt in prompts]
    return RoutingTrace(
        experts=np.array(tokens, np.uint8)[:, None],
        probs=np.broadcast_to(np.array(probs, np.float16), (len(tokens), 1, len(probs))),
        sample=np.repeat(np.arange(len(prompts), dtype=np.int32), lengths),
        token_pos=np.concatenate([np.arange(length, dtype=np.int32) for length in lengths]),
        task=np.zeros(len(prompts), np.int16),
        task_names=("any",),
        num_experts=experts,
    )


def test_a_step_waits_for_its_loads_and_reads_what_is_resident_meanwhile(mixtral: Shapes) -> None:
    dense = mixtral.dense_seconds(1)
    assert dense == pytest.approx(2.16e-3, rel=0.05)  # 1.6 G numbers without experts and table of embeddings
    loads, used = np.array([[0, 1], [2, 2]]), np.array([[2, 2], [2, 4]])
    none, one, two = 2 * READ, LOAD + READ, 2 * LOAD + 2 * READ  # by layer: what is resident is read during a load
    expected = [dense + 16 * (none + one), dense + 16 * (two + two)]
    assert mixtral.step_seconds(1, loads, used) == pytest.approx(expected)


def test_speeds_are_over_those_of_exact(mixtral: Shapes) -> None:
    loads = np.array([[[1], [1], [1], [1]], [[1], [0], [0], [0]]])
    steps = Steps((0.0, 0.3), loads, np.full((2, 4, 1), 2), np.array([0.0, 0.1]))
    exact, bounded, resident = modelled(mixtral, steps, 1)
    assert (exact["loads_per_token_layer"], bounded["loads_per_token_layer"]) == (1, 0.25)
    assert bounded["substituted_weight"] == 0.1
    dense, waited, free = mixtral.dense_seconds(1), 32 * (LOAD + READ), 32 * 2 * READ
    assert exact["tokens_per_s"] == pytest.approx(1 / (dense + waited))
    assert bounded["tokens_per_s"] == pytest.approx(1 / (dense + waited / 4 + 3 * free / 4))
    assert resident["tokens_per_s"] == pytest.approx(1 / (dense + free))
    assert (exact["over_exact"], bounded["contract"], resident["contract"]) == (1, "bounded", "resident")
    assert bounded["over_exact"] == pytest.approx(bounded["tokens_per_s"] / exact["tokens_per_s"])


def test_a_scaled_link_takes_as_many_layer_times(mixtral: Shapes) -> None:
    layer = mixtral.dense_seconds(1) / 32 + 2 * READ
    assert mixtral.loads_per_layer_time(1) == pytest.approx(LOAD / layer, rel=1e-3)
    gbps = scaled_link_gbps(mixtral, 1, layer_seconds=0.004, record_bytes=1_000_000)
    assert 1_000_000 / (1e9 * gbps) == pytest.approx(0.004 * LOAD / layer, rel=1e-3)


def test_prompts_take_the_place_that_is_free_first() -> None:
    trace = trace_of([[[0, 1]] * 3, [[0, 1]] * 2, [[0, 1]] * 2], [0.6, 0.4])
    assert side_by_side(trace, 2).tolist() == [[0, 3], [1, 4], [2, 5]]
    assert side_by_side(trace, 1).tolist() == [[0], [1], [2], [3], [4], [5], [6]]


def test_an_expert_that_two_rows_need_is_loaded_once_for_all() -> None:
    """Experts 0 and 1 are resident. One row needs 2; the other might do without it, and has it all the same."""
    trained = trace_of([[[0, 1]]], [0.6, 0.4])
    both = trace_of([[[2, 0]], [[0, 2]]], [0.6, 0.4])
    found = replay_steps(both, trained, 0.5, [0.0, 0.5], batch=2)
    assert found.loads.tolist() == [[[1]], [[1]]]
    assert found.used.tolist() == [[[2]], [[2]]]
    assert found.given_up.tolist() == [0, 0]
    alone = replay_steps(trace_of([[[0, 2]]], [0.6, 0.4]), trained, 0.5, [0.5], batch=1)
    assert alone.loads.tolist() == [[[0]]]
    assert alone.used.tolist() == [[[1]]]
    assert alone.given_up.tolist() == pytest.approx([0.4], abs=1e-3)


def test_one_prompt_at_a_time_loads_what_the_replay_of_tokens_loads() -> None:
    trace = make_trace(experts=16, top_k=4)
    tolerances = [0.0, 0.15, 0.25]
    rows = replay(trace, trace, 0.5, tolerances)
    steps = replay_steps(trace, trace, 0.5, tolerances, batch=1)
    assert steps.loads.mean(axis=(1, 2)).tolist() == pytest.approx([row["breaches"] for row in rows])
    assert steps.given_up.tolist() == pytest.approx([row["substituted_weight"] for row in rows])


def test_the_first_choices_are_the_best() -> None:
    trace = trace_of([[[3, 1, 0], [2, 0, 1]]], [0.5, 0.3, 0.2])
    cut = first_choices(trace, 2)
    assert cut.experts[:, 0].tolist() == [[3, 1], [2, 0]]
    assert (cut.top_k, cut.probs.shape) == (2, (2, 1, 2))
    assert first_choices(trace, 3) is trace
    assert cut.num_experts == 4
