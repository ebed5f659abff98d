"""`benchmarks.contracts`: the replay keeps the promise of the contract, the live run fills every column."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.contracts.__main__ import main
from benchmarks.contracts.account import PARTS
from benchmarks.contracts.replay import replay
from benchmarks.contracts.scores import Observed, policy_scores, worth
from benchmarks.quality import served
from benchmarks.residency.forecasts import learn_from, plan_of
from emoe_jax import Engine
from emoe_jax.policies.dynamics import Dynamics
from emoe_jax.policies.policy import ResidencyPolicy
from emoe_jax.policies.refresh import Refresh
from emoe_jax.policies.rule import ExpectedWishes
from emoe_jax.traces import RoutingTrace
from tests.benchmarks.quality_samples import write_model
from tests.traces.synthetic import make_trace


@pytest.fixture(scope="module")
def trace() -> RoutingTrace:
    """Four choices of sixteen experts, of shares from a tenth to two fifths."""
    drawn = make_trace(experts=16, top_k=4)
    shares = np.asarray([0.4, 0.3, 0.2, 0.1], np.float16)
    return dataclasses.replace(drawn, probs=np.broadcast_to(shares, drawn.probs.shape))


def test_a_higher_tolerance_loads_less_and_substitutes_more(trace: RoutingTrace) -> None:
    rows = replay(trace, trace, 0.5, [0.0, 0.15, 0.25, 0.35, 1.0])
    loads, weights, free = (
        [row[name] for row in rows] for name in ("loads_per_token_layer", "substituted_weight", "free_tokens")
    )
    assert loads == sorted(loads, reverse=True)
    assert weights == sorted(weights)
    assert free == sorted(free)
    assert weights[0] == 0
    misses = (1 - rows[0]["coverage"]) * trace.top_k
    assert loads[0] == pytest.approx(misses)  # every miss is loaded


def test_first_choices_are_always_loaded(trace: RoutingTrace) -> None:
    [kept] = replay(trace, trace, 0.5, [1.0], sacred=trace.top_k)
    [none] = replay(trace, trace, 0.5, [0.0])
    assert kept == {**none, "tolerance": 1.0}


def test_exchanges_are_loads_that_raise_coverage(trace: RoutingTrace) -> None:
    [without] = replay(trace, trace, 0.5, [0.25])
    [few] = replay(trace, trace, 0.5, [0.25], exchange=10.0)
    [many] = replay(trace, trace, 0.5, [0.25], exchange=0.01)
    assert few == without
    assert many["loads_per_token_layer"] > many["breaches"]
    assert many["coverage"] > without["coverage"]
    assert many["substituted_weight"] < without["substituted_weight"]


def test_further_ranks_say_which_residents_would_have_stood_in() -> None:
    """Experts 0 and 1 are resident throughout. Tokens choose 0 and 2, and expert 1 ranks next or after 3."""
    experts = np.broadcast_to(np.asarray([0, 2], np.uint8), (4, 1, 2))
    further = np.asarray([[[1, 3]], [[3, 1]], [[3, 4]], [[1, 4]]], np.uint8)
    trace = RoutingTrace(
        experts=experts,
        probs=np.broadcast_to(np.asarray([0.6, 0.2], np.float16), experts.shape),
        sample=np.zeros(4, np.int32),
        token_pos=np.arange(4, dtype=np.int32),
        task=np.zeros(1, np.int16),
        task_names=("qa",),
        num_experts=5,
        further_experts=further,
        further_probs=np.broadcast_to(np.asarray([0.1, 0.05], np.float16), further.shape),
    )
    trained = dataclasses.replace(trace, experts=np.broadcast_to(np.asarray([0, 1], np.uint8), experts.shape))
    [exact, bounded] = replay(trace, trained, 0.4, [0.0, 0.3])
    assert (exact["stand_in_weight"], exact["margin"], exact["known_stand_ins"]) == (0, 0, 1)
    assert bounded["substituted_weight"] == pytest.approx(0.25, abs=1e-3)
    assert bounded["known_stand_ins"] == 3 / 4
    stand_ins = np.asarray([0.1, 0.05, 0, 0.1]) / 0.8
    assert bounded["stand_in_weight"] == pytest.approx(stand_ins.mean(), abs=1e-3)
    assert bounded["margin"] == pytest.approx(0.25 - stand_ins[[0, 1, 3]].mean(), abs=1e-3)
    plain = dataclasses.replace(trace, further_experts=None, further_probs=None)
    assert "margin" not in replay(plain, trained, 0.4, [0.3])[0]


def test_scores_may_be_those_of_the_policy_that_the_engine_asks(trace: RoutingTrace) -> None:
    """Those that it has after every token, in its own form: with NumPy, step by step."""
    dynamics = Dynamics.untrained(trace.num_layers, trace.num_experts)
    learned = learn_from(trace, dynamics=dynamics)
    counted = np.broadcast_to(np.arange(1, trace.top_k + 1), trace.experts.shape)  # each rank for another number
    scores = policy_scores(trace, learned, counted.astype(np.float32))
    assert len(scores) == trace.num_tokens
    rates = (trace.top_k * plan_of("emoe", learned, trace, 1)).astype(np.float32)
    policy = ResidencyPolicy(Refresh(dynamics), trace.num_layers, trace.num_experts, rates[0])
    for token, prompt in enumerate(trace.sample[:90]):
        if token == 0 or prompt != trace.sample[token - 1]:
            policy.plan(ExpectedWishes(rates[prompt], rates[prompt], 0.0))
        wished = trace.experts[token][..., None] == np.arange(trace.num_experts)
        policy.observe((wished * counted[token][..., None]).sum(1))
        np.testing.assert_allclose(scores[token], policy.scores(), atol=1e-4)


def test_wishes_count_for_what_a_policy_is_told_of_them(trace: RoutingTrace) -> None:
    counted: dict[tuple[Observed, float], list[float]] = {
        ("wishes", 0.25): [1, 1, 1, 1],
        ("weights", 0.25): [1.6, 1.2, 0.8, 0.4],
        ("breaches", 0.25): [4 / 2.6, 4 / 2.6, 1.2 / 2.6, 1.2 / 2.6],
        ("breaches", 0.9): [4 / 1.9, 1.2 / 1.9, 1.2 / 1.9, 1.2 / 1.9],  # the first choice may never be replaced
    }
    for (observed, tolerance), of_token in counted.items():
        values = worth(trace, observed, tolerance)
        np.testing.assert_allclose(values, np.broadcast_to(of_token, values.shape), rtol=2e-3)


def test_scores_decide_who_goes(trace: RoutingTrace) -> None:
    """With the means that the replay makes itself it does the same; with their opposite it loads more."""
    weights = np.zeros((trace.num_tokens, trace.num_layers, trace.num_experts), np.float32)
    np.put_along_axis(weights, trace.experts.astype(np.int64), trace.probs.astype(np.float32), axis=2)
    means = np.empty_like(weights)
    mean = trace.counts().sum(0) / trace.num_tokens / trace.top_k
    for token, of_token in enumerate(weights):
        means[token] = mean = 0.95 * mean + 0.05 * of_token
    rows = [replay(trace, trace, 0.5, [0.25], exchange=0.03, scores=scores)[0] for scores in (None, means, -means)]
    for name in ("breaches", "loads_per_token_layer", "substituted_weight"):
        assert rows[1][name] == pytest.approx(rows[0][name], rel=0.02)
        assert rows[2][name] > 1.5 * rows[0][name]


def test_with_room_for_all_nothing_is_missed(trace: RoutingTrace) -> None:
    [row] = replay(trace, trace, 1.0, [0.0])
    assert (row["breaches"], row["coverage"], row["free_tokens"]) == (0, 1, 1)


def test_the_command_fills_every_row(tmp_path: Path, trace: RoutingTrace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "warm_up", lambda _: None)
    monkeypatch.setattr(served, "ANSWER_TOKENS", 6)
    model = write_model(tmp_path / "tiny")
    trace.save(tmp_path / "trace.npz")
    options = ["--batches", "1", "--tasks", "facts", "--prompts", "1", "--stretches", "1", "--tolerances", "0.5"]
    traced = ["--trace", str(tmp_path / "trace.npz"), "--json", str(tmp_path / "numbers.json")]
    assert main(["--model", str(model), *options, *traced]) == 0
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert [row["tolerance"] for row in numbers["replay"]["0.5"]] == [0, 0.5]
    exact, *bounded, resident = numbers["live"]
    assert (exact["contract"], resident["contract"]) == ("exact", "resident")
    assert [row["tolerance"] for row in bounded] == [0.5]
    assert exact["perplexity_ratio"] == pytest.approx(1, abs=1e-4)
    assert exact["similarity"] == 1
    assert exact["substituted_weight"] == 0 < resident["substituted_weight"]
    assert exact["loads_per_token"] > resident["loads_per_token"] == 0
    assert exact["loads_per_token"] >= bounded[0]["loads_per_token"]
    assert all(row["tokens_per_s"] > 0 for row in numbers["live"])
    for row in numbers["live"]:
        account = row["account"]
        assert sum(account[part]["ms"] for part in PARTS) == pytest.approx(account["ms_per_step"])
        assert account["policy"]["calls"] > account["loop"]["calls"] == 1
        assert (account["loads"]["calls"] > 0) == (row["loads_per_token"] > 0) == (account["routers"]["calls"] > 0)
    assert resident["account"]["whole"]["calls"] == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--no-live"], "--no-live needs a --trace"),
        (["--tolerances", "2"], "'2' is not a share from 0 to 1"),
        (["--shares", "0"], "'0' is not a share above 0"),
    ],
)
def test_wrong_arguments_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err
