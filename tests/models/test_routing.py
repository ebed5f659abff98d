"""The router's weights: finite whatever the logits, and those of the definition."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emoe_jax.config import ModelConfig, RouterConfig
from emoe_jax.errors import ConfigError
from emoe_jax.models import config_from_hf
from emoe_jax.models.routing import Allowances, route

BASE: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}),
    ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}),
    ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True}),
    (
        "qwen2_moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
    ),
]
CONFIGS = [config_from_hf(BASE | {"model_type": name} | raw) for name, raw in FAMILIES]
CONFIGS.append(CONFIGS[1].replace(family="openmoe", router=RouterConfig(norm_topk_prob=False, capacity_factor=2.0)))

bounded_route = jax.jit(route, static_argnames="config")

ROWS = [  # logits, allowed
    ([95.0, 95, 1, 0], [2, 3]),
    ([1e4, 0, -3, -1e4], [1, 2, 3]),
    ([-2e38, 3e38, 0, 1], [0, 2]),
    ([87.0, 0, 88, -1], [1, 3]),
    ([0.5, 0.25, 0.5, 0.0], [0, 1, 2, 3]),
    ([np.inf, 3, 2, 1], [0, 3]),
    ([np.inf, np.inf, -np.inf, 1], [2, 3]),
    ([-np.inf, -np.inf, 5, 5], [0, 1]),
]


def defined(logits: list[float], allowed: list[int], config: ModelConfig) -> tuple[list[int], np.ndarray]:
    """Ids and weights by the definition, in float64, with infinite logits as the largest float32."""
    limit = float(np.finfo(np.float32).max)
    x = np.clip(np.asarray(logits, np.float64), -limit, limit)
    ids = sorted(allowed, key=lambda e: (-x[e], e))[: config.top_k]
    pool = ids if config.router.norm_topk_prob else list(range(len(x)))
    return ids, np.exp(x[ids] - x[pool].max()) / np.exp(x[pool] - x[pool].max()).sum()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.family}-{c.router.norm_topk_prob}")
@pytest.mark.parametrize(("logits", "allowed"), ROWS)
def test_weights_are_finite_and_those_of_the_definition(
    config: ModelConfig, logits: list[float], allowed: list[int]
) -> None:
    mask = np.zeros((1, 4), bool)
    mask[0, allowed] = True
    routing = jax.jit(route, static_argnames="config")(jnp.asarray([logits], jnp.float32), config, jnp.asarray(mask))
    ids, weights = defined(logits, allowed, config)
    assert routing.ids[0].tolist() == ids
    np.testing.assert_allclose(routing.weights[0], weights, rtol=1e-5, atol=1e-30)
    if config.router.norm_topk_prob:
        assert float(jnp.sum(routing.weights)) == pytest.approx(1)
    wishes, probs = defined(logits, [0, 1, 2, 3], config.replace(router=RouterConfig(norm_topk_prob=False)))
    assert routing.wish_ids[0].tolist() == wishes
    np.testing.assert_allclose(routing.wish_probs[0], probs, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.family}-{c.router.norm_topk_prob}")
def test_all_allowed_is_not_restricted_bit_for_bit(config: ModelConfig) -> None:
    logits = jax.random.normal(jax.random.key(0), (50, 4)) * 20
    free, all_allowed = route(logits, config), route(logits, config, jnp.ones((50, 4), bool))
    for one, other in zip(free, all_allowed, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("config", CONFIGS[:3], ids=lambda c: f"{c.family}-{c.router.norm_topk_prob}")
@pytest.mark.parametrize(("allowed", "ids"), [([2], [2, 4]), ([], [4, 4])])
def test_fewer_residents_than_top_k(config: ModelConfig, allowed: list[int], ids: list[int]) -> None:
    """What is left over is no assignment, and takes no weight from what is there."""
    mask = np.zeros((1, 4), bool)
    mask[0, allowed] = True
    routing = route(jnp.asarray([[3.0, 2, 1, 0]]), config, jnp.asarray(mask))
    assert routing.ids[0].tolist() == ids
    alone = 1.0 if config.router.norm_topk_prob else float(jax.nn.softmax(jnp.asarray([3.0, 2, 1, 0]))[2])
    np.testing.assert_allclose(routing.weights[0], [alone if e < 4 else 0.0 for e in ids], rtol=1e-5)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.family}-{c.router.norm_topk_prob}")
@pytest.mark.parametrize("restricted", [False, True])
def test_a_row_of_nan_asks_for_nothing_and_counts_for_nothing(config: ModelConfig, restricted: bool) -> None:
    good = jnp.asarray([[1.0, 2, 3, 4], [4.0, 3, 2, 1], [0.0, 5, 1, 2]])
    mask = jnp.asarray([[False, True, True, True]] * 3) if restricted else None
    for bad in (jnp.nan, -jnp.nan):  # the sign says where a sort puts it
        spoilt = route(good.at[1, 2].set(bad), config, mask)
        clean = route(good, config, mask)
        assert spoilt.ids[1].tolist() == [4, 4]
        assert np.isnan(spoilt.weights[1]).all()
        assert spoilt.known.tolist() == [True, False, True]
        for row in (0, 2):
            assert spoilt.ids[row].tolist() == clean.ids[row].tolist()
            np.testing.assert_array_equal(spoilt.weights[row], clean.weights[row])
        assert np.isfinite(spoilt.substituted_weight).all()
        assert (float(spoilt.substituted_weight[1]), spoilt.substituted[1].any()) == (0, False)


@st.composite
def rows_and_allowances(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, Allowances]:
    """Logits of three rows, the residents, and what each row allows."""
    shares = st.sampled_from([0.0, 0.05, 0.2, 0.4, 1.0])
    logits = draw(st.lists(st.lists(st.floats(-4, 4, width=32), min_size=8, max_size=8), min_size=3, max_size=3))
    resident = draw(st.lists(st.booleans(), min_size=8, max_size=8))
    by_row = [draw(st.lists(of, min_size=3, max_size=3)) for of in (shares, shares, st.integers(0, 4))]
    tolerance, budget = (jnp.asarray(values, jnp.float32) for values in by_row[:2])
    allowances = Allowances(tolerance, budget, jnp.asarray(by_row[2], jnp.int32))
    return np.asarray(logits, np.float32), np.asarray(resident), allowances


@given(rows_and_allowances(), st.booleans())
def test_only_what_a_row_allows_is_replaced(given_rows: Any, renormalised: bool) -> None:
    logits, resident, allowances = given_rows
    config = CONFIGS[1].replace(num_experts=8, top_k=4, router=RouterConfig(norm_topk_prob=renormalised))
    routing = bounded_route(logits, config, np.tile(resident, (3, 1)), None, allowances)
    left = np.asarray(allowances.after(routing).budget)
    for row in range(3):
        tolerance, budget, sacred = (float(of[row]) for of in allowances)
        wishes, ids, substituted = (np.asarray(of[row]) for of in (routing.wish_ids, routing.ids, routing.substituted))
        shares = np.asarray(routing.wish_shares[row])
        may_go = ~resident[wishes] & (shares < tolerance) & (np.arange(4) >= sacred)
        assert not (substituted & ~may_go).any()
        assert shares[substituted].sum() <= budget + 1e-5
        kept = may_go & ~substituted  # only because the budget is spent
        assert all(shares[substituted].sum() + share > budget - 1e-5 for share in shares[kept])
        np.testing.assert_array_equal(ids, np.where(substituted, 8, wishes))
        whole = shares if renormalised else np.asarray(routing.wish_probs[row])
        np.testing.assert_allclose(routing.weights[row], np.where(substituted, 0, whole), rtol=1e-5, atol=1e-7)
        assert left[row] == pytest.approx(budget - shares[substituted].sum(), abs=1e-5)


def test_the_contracts_are_allowances() -> None:
    """Without a tolerance every wish is kept, and without a bound none that is absent."""
    logits = np.random.default_rng(0).normal(0, 2, (40, 4)).astype(np.float32)
    mask = np.tile(np.array([True, False, True, False]), (40, 1))
    for config in CONFIGS[1:3]:
        for tolerance, allowed in ((0.0, None), (np.inf, mask)):
            bound, budget = (jnp.full(40, value, jnp.float32) for value in (tolerance, np.inf))
            allowances = Allowances(bound, budget, jnp.zeros(40, jnp.int32))
            ours, plain = (
                bounded_route(logits, config, mask, None, allowances),
                bounded_route(logits, config, allowed),
            )
            for field in ("ids", "weights", "substituted"):
                np.testing.assert_array_equal(getattr(ours, field), getattr(plain, field))


SIGMOID = CONFIGS[1].replace(
    num_experts=8,
    top_k=3,
    router=RouterConfig(score="sigmoid", scale=1.5, choice_bias=True, groups=4, chosen_groups=2),
)


def defined_choice(
    logits: np.ndarray, bias: np.ndarray, allowed: list[int], config: ModelConfig
) -> tuple[list[int], np.ndarray]:
    """Ids and weights of one row by the definition, in float64."""
    router = config.router
    x = np.asarray(logits, np.float64)
    scores = 1 / (1 + np.exp(-x)) if router.score == "sigmoid" else np.exp(x - x.max()) / np.exp(x - x.max()).sum()
    ranks = scores + bias
    size = len(x) // router.groups
    counted = 1 if router.group_rank == "best" else 2
    of_group = np.sort(ranks.reshape(router.groups, size), axis=1)[:, -counted:].sum(axis=1)
    best = np.argsort(-of_group, kind="stable")[: router.chosen_groups]
    ids = sorted(allowed, key=lambda e: (e // size not in best, -ranks[e], e))[: config.top_k]
    weights = scores[ids] / (scores[ids].sum() if router.norm_topk_prob else 1)
    return ids, router.scale * weights


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize(
    ("groups", "rank"), [(1, "two_best"), (2, "two_best"), (4, "two_best"), (2, "best"), (8, "best")]
)
@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("allowed", [[0, 1, 2, 3, 4, 5, 6, 7], [0, 2, 3, 6, 7], [1, 4, 5], [6]])
def test_a_bias_chooses_and_does_not_weigh(
    score: Any, groups: int, rank: Any, normalised: bool, allowed: list[int]
) -> None:
    """Substitutes rank by the biased score, those of the chosen groups first, and weigh by their own scores."""
    rng = np.random.default_rng(groups)
    logits, bias = rng.normal(0, 2, (64, 8)).astype(np.float32), rng.normal(0, 0.4, 8).astype(np.float32)
    router = RouterConfig(score, normalised, 1.5, False, True, groups, max(1, groups // 2), rank)
    config = SIGMOID.replace(top_k=min(3, 8 // groups * router.chosen_groups), router=router)
    mask = np.zeros((64, 8), bool)
    mask[:, allowed] = True
    routing = bounded_route(logits, config, mask, None, None, bias)
    plain = bounded_route(logits, config, None, None, None, bias)
    for row in range(64):
        wishes, weights = defined_choice(logits[row], bias, list(range(8)), config)
        assert routing.wish_ids[row].tolist() == plain.ids[row].tolist() == wishes
        np.testing.assert_allclose(plain.weights[row], weights, rtol=1e-5)
        ids, weights = defined_choice(logits[row], bias, allowed, config)
        absent = [8] * (config.top_k - len(ids))
        assert routing.ids[row].tolist() == ids + absent
        np.testing.assert_allclose(routing.weights[row], [*weights, *([0] * len(absent))], rtol=1e-5)
        assert routing.substituted[row].tolist() == [wish not in allowed for wish in wishes]
        shares = np.asarray(plain.weights[row]) / np.asarray(plain.weights[row]).sum()
        np.testing.assert_allclose(routing.wish_shares[row], shares, rtol=1e-5)
        lost = sum(share for share, wish in zip(shares, wishes, strict=True) if wish not in allowed)
        assert float(routing.substituted_weight[row]) == pytest.approx(lost, abs=1e-5)


def test_sigmoids_that_underflow_still_weigh() -> None:
    logits = np.asarray([[-3e38, -200, -201, -1e4, -np.inf, -1e30, -300, -400]], np.float32)
    config = SIGMOID.replace(router=RouterConfig(score="sigmoid"))
    routing = route(jnp.asarray(logits), config, jnp.asarray([[False, False, True, True, True, True, True, False]]))
    assert np.isfinite(routing.weights).all()
    assert float(jnp.sum(routing.weights)) == pytest.approx(1)
    assert np.isfinite(routing.substituted_weight).all()


def test_the_smallest_share_goes_first_whatever_the_bias_ranks_first() -> None:
    """The first choice, by its bias, weighs least: a budget that only its share fits is spent on it."""
    config = SIGMOID.replace(top_k=3, router=RouterConfig(score="sigmoid", choice_bias=True))
    logits = np.asarray([[-2.0, 1, 2, -9, -9, -9, -9, -9]], np.float32)
    bias = np.asarray([5.0, 0, 0, 0, 0, 0, 0, 0], np.float32)
    allowances = Allowances(jnp.ones(1), jnp.full(1, 0.1), jnp.zeros(1, jnp.int32))
    routing = bounded_route(logits, config, np.zeros((1, 8), bool), None, allowances, bias)
    assert routing.wish_ids[0].tolist() == [0, 2, 1]
    assert routing.substituted[0].tolist() == [True, False, False]
    assert routing.ids[0].tolist() == [8, 2, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"groups": 3}, "8 experts are not a multiple of 3 groups"),
        ({"groups": 4, "chosen_groups": 5}, "5 chosen groups of experts do not fit 4 groups"),
        ({"groups": 4, "chosen_groups": 1}, "top-k of 3 does not fit 1 groups of 2 experts"),
        ({"groups": 8, "chosen_groups": 8}, "top-k of 3 does not fit 8 groups of 1 experts"),
    ],
)
def test_groups_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SIGMOID.replace(router=RouterConfig(**changes))
