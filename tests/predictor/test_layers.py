"""The closed form given earlier layers: finds what they say, each layer by its own numbers, and nothing in noise."""

import dataclasses

import numpy as np
import pytest

from emoe_jax.predictor import Predictor, PredictorConfig, PredictorError, Prompts
from emoe_jax.predictor.inputs import History
from emoe_jax.predictor.layers import LayerPrior
from emoe_jax.predictor.prompts import frequencies
from emoe_jax.predictor.regression import fit_ridge
from train.predictor.coverage import coverage_at

M, E, TOP_K, P = 5, 8, 2, 120


def hidden_mood(seed: int, dealt: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """A prior that knows nothing, and counts of prompts that are each in a mood which all layers show.

    Each layer numbers its experts in its own order. `dealt`: every layer shows another prompt's mood.
    """
    rng = np.random.default_rng(7)
    names = np.argsort(rng.random((M, E)), axis=-1)
    liked = rng.dirichlet(np.full(E, 0.4), 4)
    draw = np.random.default_rng(seed)
    mood = draw.integers(0, 4, P)
    counts = np.zeros((P, M, E), np.int32)
    for layer in range(M):
        shown = draw.permutation(mood) if dealt else mood
        for prompt in range(P):
            counts[prompt, layer, names[layer]] = draw.multinomial(80, liked[shown[prompt]])
    prior = np.broadcast_to(frequencies(counts.sum(0)), counts.shape) + np.float32(1e-4)
    return prior / prior.sum(-1, keepdims=True), counts


def test_earlier_layers_tell_later_ones_whatever_their_experts_are_numbered():
    prior, counts = hidden_mood(0)
    layers, left_out = LayerPrior.fit(prior, counts, TOP_K)
    later_prior, later = hidden_mood(1)
    given = layers.predict(later_prior, frequencies(later))
    np.testing.assert_allclose(given.sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(given[:, 0], later_prior[:, 0], atol=1e-3)  # nothing comes before the first layer
    blind, seen = (coverage_at(of[:, 1:], later[:, 1:], 0.25) for of in (later_prior, given))
    best = coverage_at(frequencies(later)[:, 1:], later[:, 1:], 0.25)
    assert seen > blind + 0.8 * (best - blind)
    assert coverage_at(left_out[:, 1:], counts[:, 1:], 0.25) > blind + 0.8 * (best - blind)


def test_nothing_is_found_where_layers_have_nothing_in_common():
    prior, counts = hidden_mood(0, dealt=True)
    layers, left_out = LayerPrior.fit(prior, counts, TOP_K)
    later_prior, later = hidden_mood(1, dealt=True)
    given = layers.predict(later_prior, frequencies(later))
    assert coverage_at(given, later, 0.25) < coverage_at(later_prior, later, 0.25) + 0.03
    assert coverage_at(left_out, counts, 0.25) < coverage_at(prior, counts, 0.25) + 0.03


def test_a_layer_is_predicted_from_earlier_ones_only_and_from_as_many_as_are_known():
    prior, counts = hidden_mood(0)
    layers, _ = LayerPrior.fit(prior, counts, TOP_K)
    shares = frequencies(counts)
    whole = layers.predict(prior, shares)
    for known in range(M + 1):
        scrambled = np.array(shares)
        scrambled[:, known:] = np.random.default_rng(0).dirichlet(np.ones(E), (P, M - known))
        np.testing.assert_allclose(layers.predict(prior, scrambled)[:, : known + 1], whole[:, : known + 1], atol=1e-6)
        partial = layers.predict(prior, scrambled, known=known)
        np.testing.assert_allclose(partial, layers.predict(prior, shares, known=known), atol=1e-6)
        np.testing.assert_allclose(partial[:, : known + 1], whole[:, : known + 1], atol=1e-6)
    nothing = layers.predict(prior, shares, known=0)
    np.testing.assert_allclose(nothing, prior, atol=1e-3)
    # The first layer alone tells the last one already.
    first = coverage_at(layers.predict(prior, shares, known=1)[:, -1:], counts[:, -1:], 0.25)
    assert first > coverage_at(prior[:, -1:], counts[:, -1:], 0.25) + 0.1


def test_few_tokens_are_trusted_less():
    prior, counts = hidden_mood(0)
    layers, _ = LayerPrior.fit(prior, counts, TOP_K)
    shares = frequencies(counts)
    moved = [np.abs(layers.predict(prior, shares, tokens=tokens) - prior).sum() for tokens in (1, 4, 16, 40)]
    assert moved == sorted(moved)
    assert moved[0] < 0.7 * moved[-1]
    np.testing.assert_array_equal(layers.predict(prior, shares, tokens=1000), layers.predict(prior, shares))


def test_matrices_survive_a_file(tmp_path):
    prior, counts = hidden_mood(0)
    layers, _ = LayerPrior.fit(prior, counts, TOP_K)
    layers.save(tmp_path / "layers.npz")
    loaded = LayerPrior.load(tmp_path / "layers.npz", PredictorConfig(M, E, TOP_K))
    shares = frequencies(counts)
    for tokens in (None, 5):
        one, other = (each.predict(prior, shares, known=3, tokens=tokens) for each in (layers, loaded))
        np.testing.assert_allclose(one, other, atol=2e-3)
    with pytest.raises(PredictorError, match=r"holds matrices of shape \[80, 8\], it should be \[48, 8\]"):
        LayerPrior.load(tmp_path / "layers.npz", PredictorConfig(4, E, TOP_K))


@pytest.mark.parametrize("variant", ["layer-by-layer", "all-layer"])
def test_a_predictor_answers_layer_by_layer(variant):
    _, counts = hidden_mood(0)
    prompts = Prompts(("any",) * P, np.zeros((P, 0), np.float32), counts, counts)
    predictor = Predictor(PredictorConfig(M, E, TOP_K, variant=variant), prompts.take(range(80)))
    start = predictor.prior(with_first=False).left_out()
    predictor.layers, _ = LayerPrior.fit(start, predictor.memory.counts, TOP_K)
    asked = prompts.take(range(80, P))
    histories = [History.empty(M, E)] * len(asked)
    prior = predictor.predict_many(asked, histories, with_first=False)
    routed = frequencies(asked.counts)
    given = predictor.given_layers(asked, prior, histories, routed)
    assert coverage_at(given, asked.counts, 0.25) > coverage_at(prior, asked.counts, 0.25) + 0.1
    partly = predictor.given_layers(asked, prior, histories, routed, known=2, tokens=8)
    hidden = dataclasses.replace(asked, counts=np.concatenate([asked.counts[:, :2], asked.counts[:, :1:-1]], axis=1))
    same = predictor.given_layers(asked, prior, histories, frequencies(hidden.counts), known=2, tokens=8)
    np.testing.assert_allclose(partly, same, atol=1e-6)


@pytest.mark.parametrize("features", [5, 30])
def test_left_out_rows_are_predicted_as_by_a_fit_without_them(features):
    rng = np.random.default_rng(0)
    x, y, weight = rng.normal(size=(12, features)), rng.normal(size=(12, 3)), rng.uniform(0.5, 2, 12)
    ridge = fit_ridge(x, y, [0.7], weight)
    others = np.arange(12) != 4
    gram = x[others].T @ (weight[others, None] * x[others]) + 0.7 * np.eye(features)
    expected = x[4] @ np.linalg.solve(gram, x[others].T @ (weight[others, None] * y[others]))
    np.testing.assert_allclose(ridge.left_out[4], expected, rtol=1e-6)
    gram = x.T @ (weight[:, None] * x) + 0.7 * np.eye(features)
    np.testing.assert_allclose(ridge.weights, np.linalg.solve(gram, x.T @ (weight[:, None] * y)), rtol=1e-6)


def test_the_penalty_is_chosen_by_left_out_rows():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 20))
    clear, noise = x @ rng.normal(size=(20, 2)), rng.normal(size=(60, 2))
    assert fit_ridge(x, clear, (0.01, 1.0, 1e4)).penalty == 0.01
    assert fit_ridge(x, noise, (0.01, 1.0, 1e4)).penalty == 1e4
