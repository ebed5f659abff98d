"""The runtime: loading, predicting as the engine does, learning from what was observed, refusing other models."""

import json

import numpy as np
import pytest

from emoe_jax.predictor import Predictor, PredictorConfig, PredictorError, Prompts, network
from emoe_jax.predictor.inputs import History
from emoe_jax.predictor.layers import LayerPrior
from emoe_jax.predictor.prior import KernelPrior
from tests.traces.synthetic import make_trace

CONFIG = PredictorConfig(3, 8, 2, embedding_dim=5, width=8, heads=2, blocks=1, members=1, first_tokens=4)


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    return Prompts.of(make_trace(prompts=40), first_tokens=4)


@pytest.fixture
def predictor(prompts) -> Predictor:
    predictor = Predictor(CONFIG, prompts.take(range(30)))
    start = predictor.prior(with_first=False).left_out()
    predictor.layers, _ = LayerPrior.fit(start, predictor.memory.counts, CONFIG.top_k)
    predictor.weights = network.init(CONFIG, predictor.sizes, 0)
    return predictor


def test_a_saved_predictor_predicts_the_same(predictor, prompts, tmp_path):
    predictor.save(tmp_path / "p")
    loaded = Predictor.load(tmp_path / "p")
    for first in (None, prompts.first[35]):
        expected = predictor.predict("chat", prompts.embedding[35], first)
        np.testing.assert_allclose(loaded.predict("chat", prompts.embedding[35], first), expected, rtol=1e-5)
    assert expected.shape == (3, 8)
    np.testing.assert_allclose(expected.sum(-1), 1, rtol=1e-5)
    assert loaded.num_parameters == predictor.num_parameters > 0


def test_a_loaded_predictor_chooses_no_width_and_fits_no_prior_that_is_not_asked_for(predictor, tmp_path, monkeypatch):
    predictor.save(tmp_path)
    fitted = []
    monkeypatch.setattr(
        "emoe_jax.predictor.predictor.KernelPrior",
        lambda *arguments: fitted.append(arguments[2:]) or KernelPrior(*arguments),
    )
    loaded = Predictor.load(tmp_path)
    loaded.predict("chat")
    before, after = predictor.priors
    assert fitted == [(False, before.width)]
    assert loaded.priors[1].width == after.width
    assert fitted == [(False, before.width), (True, after.width)]


def test_where_no_width_is_stored_the_same_is_chosen(predictor, tmp_path):
    predictor.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["prior_widths"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    widths = [prior.width for prior in Predictor.load(tmp_path).priors]
    assert widths == [prior.width for prior in predictor.priors]


def test_tasks_never_seen_and_absent_embeddings_are_fine(predictor):
    for task in ("", "other", "qa/never seen"):
        assert np.isfinite(predictor.predict(task)).all()
    with pytest.raises(PredictorError, match=r"shape \[4\]"):
        predictor.predict("chat", np.ones(4, np.float32))


def test_observed_prompts_are_history_at_once_and_memory_after_refitting(predictor, prompts):
    for row in range(30, 40):
        predictor.observe(prompts.tasks[row], prompts.counts[row], prompts.embedding[row], prompts.first[row])
    np.testing.assert_allclose(predictor.history.last, prompts.counts[39] / 80, rtol=1e-6)
    assert (len(predictor.memory), predictor.num_unlearned) == (30, 10)
    before = predictor.predict(prompts.tasks[35], prompts.embedding[35])
    predictor.refit()
    assert (len(predictor.memory), predictor.num_unlearned) == (40, 0)
    after = predictor.predict(prompts.tasks[35], prompts.embedding[35])
    truth = prompts.counts[35] / 80
    assert np.abs(after - truth).sum() < np.abs(before - truth).sum()
    predictor.forget_history()
    assert np.isnan(predictor.history.last).all()


def test_memory_is_bounded_and_forgets_the_oldest(predictor, prompts, monkeypatch):
    monkeypatch.setattr("emoe_jax.predictor.predictor.MAX_MEMORY", 32)
    for row in range(30, 36):
        predictor.observe(prompts.tasks[row], prompts.counts[row], prompts.embedding[row])
    predictor.refit()
    assert len(predictor.memory) == 32
    np.testing.assert_array_equal(predictor.memory.counts, prompts.counts[4:36])


def test_an_embedding_scale_does_not_matter(predictor, prompts):
    plain = predictor.predict("chat", prompts.embedding[33])
    np.testing.assert_allclose(predictor.predict("chat", 7 * prompts.embedding[33]), plain, rtol=1e-4)


def test_history_knows_only_earlier_prompts(prompts):
    histories = History.of(prompts.counts[:3])
    assert np.isnan(histories[0].last).all()
    np.testing.assert_allclose(histories[2].last, prompts.counts[1] / 80, rtol=1e-6)
    assert (
        np.abs(histories[2].recent - prompts.counts[0] / 80).sum()
        < np.abs(histories[2].recent - histories[2].last).sum()
    )


def test_a_model_of_another_shape_is_refused_with_both_shapes(predictor):
    with pytest.raises(PredictorError, match="3 MoE layers of 8 experts, top-2; the model has 4 MoE layers of 8"):
        predictor.config.check_model(4, 8, 2, "the model")
    with pytest.raises(PredictorError, match=r"embeddings of 5 numbers; it has 6"):
        predictor.config.check_embedding(6, "it")


def test_damaged_directories_are_one_clear_line(predictor, tmp_path):
    predictor.save(tmp_path)
    good = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    config = json.loads(good["config.json"])
    without_format = {name: value for name, value in config.items() if name != "format"}
    cases = [
        ("config.json", None, "holds no predictor"),
        ("config.json", b"{", "cannot be read"),
        ("config.json", b"[1]", "not the description"),
        ("config.json", json.dumps({**config, "arch": "rnn"}).encode(), "arch is 'rnn'"),
        ("config.json", json.dumps({**config, "format": 1}).encode(), "another format than 2; `python -m train.pred"),
        ("config.json", json.dumps(without_format).encode(), "another format than 2; `python -m train.predictor"),
        ("layers.npz", None, "layers.npz is missing"),
        ("layers.npz", good["layers.npz"][:100], "damaged"),
        ("config.json", json.dumps({**config, "num_layers": "3"}).encode(), "positive integer"),
        ("config.json", json.dumps({**config, "num_layers": 4}).encode(), "the predictor is for"),
        ("config.json", json.dumps({**config, "prior_widths": [1.0]}).encode(), "two positive numbers"),
        ("config.json", json.dumps({**config, "prior_widths": [1.0, "2"]}).encode(), "two positive numbers"),
        ("config.json", json.dumps({**config, "prior_widths": 3}).encode(), "two positive numbers"),
        ("memory.npz", None, "memory.npz is missing"),
        ("memory.npz", good["memory.npz"][:200], "damaged"),
        ("weights.safetensors", None, "weights.safetensors is missing"),
        ("weights.safetensors", good["weights.safetensors"][:-8], "damaged"),
    ]
    for name, content, message in cases:
        for path, whole in good.items():
            (tmp_path / path).write_bytes(whole)
        (tmp_path / name).unlink()
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(PredictorError, match=message) as caught:
            Predictor.load(tmp_path)
        assert "\n" not in str(caught.value)
    with pytest.raises(PredictorError, match="holds no predictor"):
        Predictor.load(tmp_path / "nowhere")


def test_several_prompts_are_predicted_as_each_alone(predictor, prompts):
    asked = [(prompts.tasks[row], prompts.embedding[row]) for row in (33, 35)] + [("never seen", None)]
    together = predictor.predict_next(asked, 4)
    assert len(together) == 3
    for (task, embedding), shares in zip(asked, together, strict=True):
        np.testing.assert_allclose(shares, predictor.predict(task, embedding), rtol=1e-4, atol=1e-6)
