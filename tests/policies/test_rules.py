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
from emoe_jax.policies import POLICIES, PolicyWeights
from emoe_jax.policies.answer import AnswerNetwork
from emoe_jax.policies.dynamics import Dynamics
from emoe_jax.policies.refresh import Refresh
from emoe_jax.policies.rule import ExpectedWishes, Rule

M, E, TOP_K = 3, 6, 2


def random_dynamics(rng: np.random.Generator, with_network: bool = True) -> Dynamics:
    untrained = Dynamics.untrained(M, E)
    latent, size, hidden = 4 * len(untrained.latent_half_lives), M * E, 5
    shapes = ((size,), (size,), (latent, size), (latent, hidden), (hidden,), (hidden, size))
    network = AnswerNetwork(*(rng.normal(0, 0.3, shape).astype(np.float32) for shape in shapes))
    return untrained._replace(
        top_k=TOP_K,
        directions=rng.normal(size=(M * E, 4)).astype(np.float32),
        readout=rng.normal(size=(latent, M * E)).astype(np.float32),
        network=network if with_network else None,
    )


def knowledge(rng: np.random.Generator) -> PolicyWeights:
    return PolicyWeights(
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
            state = rule.plan(state, ExpectedWishes(convert(rates(rng)), convert(rates(rng)), 0.5))
        state = rule.observe(state, convert(wishes(rng, 1 + step)))
        states.append(state)
    return states


@pytest.mark.parametrize("name", POLICIES)
def test_numpy_and_jax_agree_and_states_stack(name: str):
    rule = POLICIES[name].rule(M, E, knowledge(np.random.default_rng(0)))
    ours = follow(rule, np.random.default_rng(1), np.asarray)
    theirs = follow(rule, np.random.default_rng(1), lambda array: jnp.asarray(array, jnp.float32))
    alone = np.stack([rule.scores(state) for state in ours])
    np.testing.assert_allclose(alone, np.stack([rule.scores(state) for state in theirs]), rtol=1e-4, atol=1e-4)
    stacked = jax.tree.map(lambda *arrays: np.stack(arrays), *ours)
    np.testing.assert_allclose(rule.scores(stacked), alone, rtol=1e-4, atol=1e-4)
    assert isinstance(rule.scores(ours[-1]), np.ndarray)


@pytest.mark.parametrize("name", ["next-layer-router", "activation-matrix"])
def test_what_must_be_learned_is_asked_for(name: str):
    with pytest.raises(ConfigError, match=f"policy '{name}' needs .* learned from a trace"):
        POLICIES[name].rule(M, E, PolicyWeights())


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_a_batch_is_forecast_linearly_as_the_sum_of_its_requests(seed: int):
    rng = np.random.default_rng(seed)
    rule = Refresh(random_dynamics(rng, with_network=False))
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
    scores = rule.scores(rule.plan(state, ExpectedWishes(fresh, fresh, 0.0)))
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


@pytest.mark.parametrize("requests", [2, 5])
def test_the_network_says_of_equal_requests_what_it_says_of_one_and_counts_less(requests: int):
    rng = np.random.default_rng(3)
    dynamics = random_dynamics(rng)
    rule, linear = Refresh(dynamics), Refresh(dynamics._replace(network=None))
    plan, counts = rates(rng), wishes(rng)
    states = [rule.observe(rule.start(n * plan), n * counts) for n in (1, requests)]
    alone, together = (rule.scores(state) - linear.scores(state) for state in states)
    assert np.abs(alone).max() > 0.01
    np.testing.assert_allclose(together * requests, alone, rtol=1e-3, atol=1e-4)


def test_the_networks_half_of_a_forecast_sums_to_top_k_per_layer():
    rng = np.random.default_rng(4)
    dynamics = random_dynamics(rng)
    state = Refresh(dynamics).observe(Refresh(dynamics).start(rates(rng)), wishes(rng))
    both, linear = Refresh(dynamics).scores(state), Refresh(dynamics._replace(network=None)).scores(state)
    networks = 2 * both - linear
    assert (networks > 0).all()
    np.testing.assert_allclose(networks.sum(-1), TOP_K, rtol=1e-4)


def test_without_a_plan_the_network_still_forecasts():
    rule = Refresh(random_dynamics(np.random.default_rng(5)))
    state = rule.observe(rule.start(np.zeros((M, E), np.float32)), wishes(np.random.default_rng(6)))
    assert np.isfinite(rule.scores(state)).all()


def assert_same_dynamics(ours: Dynamics, theirs: Dynamics) -> None:
    assert ours.top_k == theirs.top_k
    assert (ours.network is None) == (theirs.network is None)
    pairs = [*zip(ours[1:-1], theirs[1:-1], strict=True), *zip(ours.network or (), theirs.network or (), strict=True)]
    for one, other in pairs:
        np.testing.assert_allclose(one, other, rtol=1e-3)  # matrices are written in half precision


@pytest.mark.parametrize("with_network", [False, True])
def test_dynamics_are_read_as_written_and_refused_when_damaged(tmp_path: Path, with_network: bool):
    dynamics, path = random_dynamics(np.random.default_rng(0), with_network), tmp_path / "dynamics.npz"
    dynamics.save(path)
    assert_same_dynamics(dynamics, Dynamics.load(path, M, E))
    with pytest.raises(ConfigError, match="18 experts in all; the model has 4 MoE layers of 6 experts"):
        Dynamics.load(path, 4, E)
    with pytest.raises(ConfigError, match=r"missing\.npz: no such file"):
        Dynamics.load(tmp_path / "missing.npz", M, E)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ConfigError, match=r"dynamics\.npz holds no dynamics of routing"):
        Dynamics.load(path, M, E)


def test_dynamics_of_another_format_or_form_are_refused_in_one_line(tmp_path: Path):
    path = tmp_path / "dynamics.npz"
    dynamics = random_dynamics(np.random.default_rng(0))
    arrays: dict[str, Any] = {
        name: np.asarray(value) for name, value in dynamics._asdict().items() if name != "network"
    }
    np.savez(path, **arrays)  # as the first format was written
    with pytest.raises(ConfigError, match="holds dynamics of an older format than 2"):
        Dynamics.load(path, M, E)
    np.savez(path, format=2, half_lives=dynamics.half_lives)
    with pytest.raises(ConfigError, match="holds no dynamics of routing"):
        Dynamics.load(path, M, E)
    assert dynamics.network is not None
    dynamics._replace(network=dynamics.network._replace(up=dynamics.network.up[:3])).save(path)
    with pytest.raises(ConfigError, match=r"the network's up is \[3, 5\], not \[16, 5\]"):
        Dynamics.load(path, M, E)
