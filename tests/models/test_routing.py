"""The router's weights: finite whatever the logits, and those of the definition."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emoe_jax.config import ModelConfig
from emoe_jax.models import config_from_hf
from emoe_jax.models.routing import route, substituted
from emoe_jax.moe import BACKENDS, moe_ffn
from tests.moe.test_backends import Case, model, random_ids

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
CONFIGS.append(CONFIGS[1].replace(family="openmoe", norm_topk_prob=False, router_capacity_factor=2.0))

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
    pool = ids if config.norm_topk_prob else list(range(len(x)))
    return ids, np.exp(x[ids] - x[pool].max()) / np.exp(x[pool] - x[pool].max()).sum()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.family}-{c.norm_topk_prob}")
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
    if config.norm_topk_prob:
        assert float(jnp.sum(routing.weights)) == pytest.approx(1)
    wishes, probs = defined(logits, [0, 1, 2, 3], config.replace(norm_topk_prob=False))
    assert routing.wish_ids[0].tolist() == wishes
    np.testing.assert_allclose(routing.wish_probs[0], probs, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.family}-{c.norm_topk_prob}")
def test_all_allowed_is_not_restricted_bit_for_bit(config: ModelConfig) -> None:
    logits = jax.random.normal(jax.random.key(0), (50, 4)) * 20
    free, all_allowed = route(logits, config), route(logits, config, jnp.ones((50, 4), bool))
    for one, other in zip(free, all_allowed, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("config", CONFIGS[:3], ids=lambda c: f"{c.family}-{c.norm_topk_prob}")
@pytest.mark.parametrize(("allowed", "ids"), [([2], [2, 4]), ([], [4, 4])])
def test_fewer_residents_than_top_k(config: ModelConfig, allowed: list[int], ids: list[int]) -> None:
    """What is left over is no assignment, and takes no weight from what is there."""
    mask = np.zeros((1, 4), bool)
    mask[0, allowed] = True
    routing = route(jnp.asarray([[3.0, 2, 1, 0]]), config.replace(router_capacity_factor=None), jnp.asarray(mask))
    assert routing.ids[0].tolist() == ids
    alone = 1.0 if config.norm_topk_prob else float(jax.nn.softmax(jnp.asarray([3.0, 2, 1, 0]))[2])
    np.testing.assert_allclose(routing.weights[0], [alone if e < 4 else 0.0 for e in ids], rtol=1e-5)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.family}-{c.norm_topk_prob}")
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
        missed = substituted(spoilt, 4)
        assert np.isfinite(missed.weight).all()
        assert (float(missed.weight[1]), int(missed.choices[1])) == (0, 0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("R", "k", "E"), [(3, 2, 4), (40, 2, 8), (300, 1, 5)])
def test_a_row_of_nan_reaches_no_other_row(backend: str, R: int, k: int, E: int) -> None:
    """Neither by its own numbers nor by weights of NaN, with a slab whose unused slots hold NaN."""

    rng = np.random.default_rng(R)
    case = Case.of(model(E, k), random_ids(rng, R, E, k), np.arange(E), E + 1)
    want = case.run(backend)
    others = np.arange(R) != 1
    for lost in ("rows", "weights", "both"):
        spoilt = Case(**vars(case))
        if lost != "weights":
            spoilt.rows = spoilt.rows.at[1].set(jnp.nan)
        if lost != "rows":
            spoilt.weights = spoilt.weights.at[1].set(jnp.nan)
            spoilt.ids = np.where(others[:, None], case.ids, E)
        got = spoilt.run(backend)
        assert np.isnan(got[1]).all()
        np.testing.assert_allclose(got[others], want[others], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_expert_of_nan_reaches_only_its_own_rows(backend: str) -> None:

    case = Case.of(model(6, 2), [[0, 1], [2, 3], [1, 4], [5, 0]], np.arange(6), 6)
    want = case.run(backend)
    case.w_in[1] = np.nan
    got = case.run(backend)
    np.testing.assert_allclose(got[[1, 3]], want[[1, 3]], rtol=2e-5, atol=2e-5)
    assert np.isnan(got[[0, 2]]).all()


def test_a_lost_row_is_nan_although_no_expert_was_there() -> None:
    """Under `exact` nothing is loaded for it, so no wave holds its experts."""

    config = model(4, 2)
    case = Case.of(config, [[4, 4], [0, 1]], [4, 4, 4, 4], 4)
    weights = case.weights.at[0].set(jnp.nan)
    out = moe_ffn(case.rows, jnp.asarray(case.ids), weights, jnp.asarray(case.slots), case.slab(case.slots, 4), config)
    assert np.isnan(out[0]).all()
    np.testing.assert_array_equal(out[1], np.zeros(32))
