"""The forecast within answers: learned from what came last, in every layer by its own numbers; nothing from noise."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emoe_jax.policies.dynamics import Dynamics
from emoe_jax.policies.learning import learn_dynamics, non_negative, seen
from emoe_jax.policies.refresh import Refresh
from emoe_jax.policies.rule import ExpectedWishes
from emoe_jax.predictor.prompts import frequencies
from emoe_jax.traces import RoutingTrace
from train.predictor.answers import AnswerHyperparameters, forecast, judge, learn_answers, with_network

M, E, TOP_K, PROMPTS, TOKENS = 3, 8, 2, 32, 120
PLAN = AnswerHyperparameters(
    steps=400, rows=128, hidden=16, peak_rate=1e-2, input_dropout=0.1, hidden_dropout=0.1, average=0.9
)


def phases(seed: int, shuffled: bool = False) -> RoutingTrace:
    """Every ten tokens an answer turns to another of four pairs of experts; the last layer does six tokens before.

    Each layer numbers its experts in its own order. `shuffled`: the same choices, each layer's tokens in random order.
    """
    fixed = np.random.default_rng(11)
    names = np.argsort(fixed.random((M, E)), axis=-1)
    rng = np.random.default_rng(seed)
    phase = np.repeat(rng.integers(4, size=(PROMPTS, TOKENS // 10)), 10, axis=1)
    chosen = np.zeros((PROMPTS, TOKENS, M, TOP_K), np.uint8)
    for layer in range(M):
        at = np.roll(phase, -6, axis=1) if layer == M - 1 else phase
        if shuffled:
            at = rng.permutation(at.ravel()).reshape(at.shape)
        chosen[:, :, layer] = names[layer][np.stack([2 * at, 2 * at + 1], axis=-1)]
    return RoutingTrace(
        experts=chosen.reshape(-1, M, TOP_K),
        probs=np.full((PROMPTS * TOKENS, M, TOP_K), 0.5, np.float16),
        sample=np.repeat(np.arange(PROMPTS, dtype=np.int32), TOKENS),
        token_pos=np.tile(np.arange(TOKENS, dtype=np.int32), PROMPTS),
        task=np.zeros(PROMPTS, np.int16),
        task_names=("any",),
        num_experts=E,
    )


def even(trace: RoutingTrace) -> np.ndarray:
    """A plan that knows only what all prompts want."""
    return np.broadcast_to(frequencies(trace.counts().sum(0)), (trace.num_prompts, M, E))


@pytest.fixture(scope="module")
def learned() -> Dynamics:
    trace = phases(0)
    return learn_answers(trace, even(trace), PLAN)


def test_what_came_last_tells_what_comes_next_in_the_other_layers(learned: Dynamics):
    later = phases(1)
    numbers = judge(later, even(later), learned)
    assert numbers["coverage"]["0.25"] > numbers["baselines"]["prior"]["coverage"]["0.25"] + 0.25
    untold = learned._replace(
        directions=np.zeros((M * E, 0), np.float32), readout=np.zeros((0, M * E), np.float32), network=None
    )
    alone = judge(later, even(later), untold)
    # Only the last layer shows early what the others turn to.
    assert numbers["coverage"]["0.25"] > alone["coverage"]["0.25"] + 0.03
    assert 0.5 < numbers["top_k"] <= 1


def test_the_network_is_kept_where_it_helps_and_then_it_does(learned: Dynamics):
    later = phases(1)
    assert learned.network is not None
    numbers = judge(later, even(later), learned)
    assert numbers["network"] is True
    assert numbers["coverage"]["0.5"] > numbers["baselines"]["linear"]["coverage"]["0.5"]


def test_nothing_is_learned_from_tokens_in_random_order():
    trace, later = phases(0, shuffled=True), phases(1, shuffled=True)
    numbers = judge(later, even(later), learn_answers(trace, even(trace), PLAN))
    assert numbers["coverage"]["0.25"] < numbers["baselines"]["prior"]["coverage"]["0.25"] + 0.04


def test_a_network_that_does_not_help_is_left_out():
    trace = phases(0)
    dynamics = learn_dynamics(trace, even(trace))
    tokens = seen(trace, even(trace), dynamics)
    harmful = dataclasses.replace(PLAN, steps=5, peak_rate=30.0, evaluate_every=1, average=0.0)
    assert with_network(dynamics, tokens, trace, harmful, 0, lambda line: None).network is None


def test_what_is_judged_is_what_the_policy_says(learned: Dynamics):
    """`forecast` at a token equals the scores of a rule that followed the answer up to it."""
    trace = phases(2)
    start = even(trace)
    tokens = seen(trace, start, learned)
    rows = np.array([0, 1, 37, 119])
    expected = forecast(learned, tokens, rows, (M, E))
    rule = Refresh(learned)
    state = rule.start(np.zeros((M, E), np.float32))
    rates = (TOP_K * start[tokens.prompt[0]]).astype(np.float32)
    state = rule.plan(state, ExpectedWishes(rates, rates, 0.0))
    first = trace.experts[trace.sample == tokens.prompt[0]]
    found = []
    for token in range(120):
        if token in rows:
            found.append(rule.scores(state))
        state = rule.observe(state, (first[token][..., None] == np.arange(E)).sum(1))
    np.testing.assert_allclose(found, expected, atol=2e-2)  # what was seen is held in half precision


def test_a_learned_forecast_survives_its_file(learned: Dynamics, tmp_path: Path):
    learned.save(tmp_path / "dynamics.npz")
    loaded = Dynamics.load(tmp_path / "dynamics.npz", M, E)
    trace = phases(1)
    before, after = (judge(trace, even(trace), dynamics)["coverage"]["0.25"] for dynamics in (learned, loaded))
    assert after == pytest.approx(before, abs=2e-3)


def test_one_prompt_and_one_token_are_enough_to_learn_nothing():
    trace = phases(0).select([0])
    short = dataclasses.replace(
        trace, experts=trace.experts[:1], probs=trace.probs[:1], sample=trace.sample[:1], token_pos=trace.token_pos[:1]
    )
    for few in (trace, short):
        dynamics = learn_answers(few, even(few), PLAN)
        assert dynamics.network is None
        assert np.isfinite(dynamics.readout).all()


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 5))
def test_weights_are_the_best_of_those_that_are_not_negative(seed: int, features: int):
    rng = np.random.default_rng(seed)
    inputs, target = rng.standard_normal((20, features)), rng.standard_normal(20)
    found = non_negative(inputs.T @ inputs, inputs.T @ target)
    assert (found >= 0).all()
    slope = inputs.T @ (inputs @ found - target)
    np.testing.assert_allclose(slope[found > 0], 0, atol=1e-8)  # the conditions of Karush, Kuhn and Tucker
    assert (slope[found == 0] >= -1e-8).all()


def test_a_plan_that_is_wrong_is_left_behind():
    """Short prompts of two kinds, with the right plan; then one whose plan is that of the other kind."""
    rng = np.random.default_rng(0)
    kinds = rng.integers(2, size=400)
    shares = np.full((2, M, E), 0.02)
    shares[0, :, : E // 2], shares[1, :, E // 2 :] = 0.23, 0.23
    chosen = np.stack(
        [[rng.choice(E, TOP_K, replace=False, p=shares[kind, 0]) for _ in range(12 * M)] for kind in kinds]
    )
    trace = RoutingTrace(
        experts=chosen.reshape(-1, M, TOP_K).astype(np.uint8),
        probs=np.full((400 * 12, M, TOP_K), 0.5, np.float16),
        sample=np.repeat(np.arange(400, dtype=np.int32), 12),
        token_pos=np.tile(np.arange(12, dtype=np.int32), 400),
        task=kinds.astype(np.int16),
        task_names=("low", "high"),
        num_experts=E,
    )
    dynamics = learn_dynamics(trace, shares[kinds])
    assert (dynamics.weights >= 0).all()
    rule = Refresh(dynamics)
    wrong = (TOP_K * shares[0]).astype(np.float32)
    state = rule.plan(rule.start(wrong), ExpectedWishes(wrong, wrong, 0.0))
    for _ in range(60):
        counts = np.stack(
            [np.bincount(rng.choice(E, TOP_K, replace=False, p=shares[1, 0]), minlength=E) for _ in range(M)]
        )
        state = rule.observe(state, counts)
    best = np.argsort(-rule.scores(state), axis=-1)[:, : E // 2]
    assert (best >= E // 2).all()
