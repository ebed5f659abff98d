"""Rules as pure functions: the same with NumPy and JAX, alone and stacked, for a request and for a batch."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emoe_jax.errors import ConfigError
from emoe_jax.policies import POLICIES, Knowledge
from emoe_jax.policies.dynamics import Dynamics
from emoe_jax.policies.refresh import Refresh
from emoe_jax.policies.rule import Plan, Rule

M, E, TOP_K = 3, 6, 2


def random_dynamics(rng: np.random.Generator) -> Dynamics:
    untrained = Dynamics.untrained(M, E)
    latent = 4 * len(untrained.latent_half_lives)
    return untrained._replace(
        directions=rng.normal(size=(M * E, 4)).astype(np.float32),
        readout=rng.normal(size=(latent, M * E)).astype(np.float32),
    )


def knowledge(rng: np.random.Generator) -> Knowledge:
    return Knowledge(
        random_dynamics(rng),
        rng.random((M - 1, E, E)).astype(np.float32),
        rng.dirichlet(np.ones(E), (4, M)).astype(np.float32),
    )


def rates(rng: np.random.Generator) -> np.ndarray:
    return (TOP_K * rng.dirichlet(np.ones(E), M)).astype(np.float32)


def wishes(rng: np.random.Generator, tokens: int = 1) -> np.ndarray:
    """Counts of `tokens` tokens, each with its top-k."""
    chosen = rng.random((tokens, M, E)).argsort(-1)[..., :TOP_K]
    return (chosen[..., None] == np.arange(E)).sum((0, 2))


def follow(rule: Rule[Any], rng: np.random.Generator, convert: Any) -> list[Any]:
    """States after some plans and steps."""
    state = rule.start(convert(rates(rng)))
    states = [state]
    for step in range(6):
        if step % 3 == 2:
            state = rule.plan(state, Plan(convert(rates(rng)), convert(rates(rng)), 0.5))
        state = rule.observe(state, convert(wishes(rng, 1 + step)))
        states.append(state)
    return states


@pytest.mark.parametrize("name", POLICIES)
def test_numpy_and_jax_agree_and_states_stack(name: str):
    rule = POLICIES[name].rule(M, E, knowledge(np.random.default_rng(0)))
    ours = follow(rule, np.random.default_rng(1), np.asarray)
    theirs = follow(rule, np.random.default_rng(1), jnp.asarray)
    alone = np.stack([rule.scores(state) for state in ours])
    np.testing.assert_allclose(alone, np.stack([rule.scores(state) for state in theirs]), rtol=1e-4, atol=1e-4)
    stacked = jax.tree.map(lambda *arrays: np.stack(arrays), *ours)
    np.testing.assert_allclose(rule.scores(stacked), alone, rtol=1e-4, atol=1e-4)
    assert isinstance(rule.scores(ours[-1]), np.ndarray)


@pytest.mark.parametrize("name", ["next-layer-router", "activation-matrix"])
def test_what_must_be_learned_is_asked_for(name: str):
    with pytest.raises(ConfigError, match=f"policy '{name}' needs .* learned from a trace"):
        POLICIES[name].rule(M, E, Knowledge())


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_a_batch_is_forecast_as_the_sum_of_its_requests(seed: int):
    rng = np.random.default_rng(seed)
    rule = Refresh(random_dynamics(rng))
    plans = [rates(rng) for _ in range(3)]
    alone, together = [rule.start(plan) for plan in plans], rule.start(np.sum(plans, axis=0))
    for _ in range(5):
        counts = [wishes(rng) for _ in plans]
        alone = [rule.observe(state, count) for state, count in zip(alone, counts, strict=True)]
        together = rule.observe(together, np.sum(counts, axis=0))
    total = np.sum([rule.scores(state) for state in alone], axis=0)
    np.testing.assert_allclose(rule.scores(together), total, rtol=1e-3, atol=1e-3)


def test_a_new_request_begins_with_its_plan_and_forgets_the_one_before():
    rng = np.random.default_rng(0)
    rule = Refresh(random_dynamics(rng))
    state = rule.observe(rule.start(rates(rng)), wishes(rng))
    fresh = rates(rng)
    scores = rule.scores(rule.plan(state, Plan(fresh, fresh, 0.0)))
    np.testing.assert_allclose(scores, rule.scores(rule.start(fresh)), rtol=1e-5)


@pytest.mark.parametrize("name", POLICIES)
def test_equal_steps_may_be_taken_in_together(name: str):
    rng = np.random.default_rng(0)
    rule = POLICIES[name].rule(M, E, knowledge(rng))
    apart = together = rule.start(rates(rng))
    counts = wishes(rng)
    for _ in range(3):
        apart = rule.observe(apart, counts)
    together = rule.observe(together, 3 * counts, steps=3)
    if name != "next-layer-router":  # that one goes by the choices last seen, which are three steps' then
        np.testing.assert_allclose(rule.scores(together), rule.scores(apart), rtol=1e-3, atol=1e-3)


def test_dynamics_are_read_as_written_and_refused_when_damaged(tmp_path: Path):
    dynamics, path = random_dynamics(np.random.default_rng(0)), tmp_path / "dynamics.npz"
    dynamics.save(path)
    for ours, theirs in zip(dynamics, Dynamics.load(path, M, E), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    with pytest.raises(ConfigError, match="18 experts in all; the model has 4 MoE layers of 6 experts"):
        Dynamics.load(path, 4, E)
    with pytest.raises(ConfigError, match=r"missing\.npz: no such file"):
        Dynamics.load(tmp_path / "missing.npz", M, E)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ConfigError, match=r"dynamics\.npz holds no dynamics of routing"):
        Dynamics.load(path, M, E)
