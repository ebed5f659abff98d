"""The transformer: starts at the prior, sees only what it may, learns."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emoe_jax.predictor import PredictorConfig, PredictorError, network
from emoe_jax.predictor.config import ARCHITECTURES
from emoe_jax.predictor.model import CHANNELS, Inputs, Known
from emoe_jax.predictor.network import Sizes
from train.predictor import objective

CONFIG = PredictorConfig(4, 8, 2, embedding_dim=5, width=8, heads=2, blocks=2, members=2)
SIZES = Sizes(name_features=6, coordinates=5)


def make_inputs(rows: int = 2) -> Inputs:
    keys = jax.random.split(jax.random.key(0), 4)
    prior = jax.nn.log_softmax(jax.random.normal(keys[0], (rows, 4, 8)))
    layers = jax.random.normal(keys[1], (rows, 4, CHANNELS, 8))
    return Inputs(prior, layers, jax.random.normal(keys[2], (rows, 6)), jax.random.normal(keys[3], (rows, 5)))


def trained_weights(config: PredictorConfig) -> dict[str, jax.Array]:
    """Weights whose output is not zero."""
    weights = network.init(config, SIZES, 0)
    return {**weights, "head.kernel": jax.random.normal(jax.random.key(1), weights["head.kernel"].shape)}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_untrained_networks_repeat_the_prior(arch):
    config = dataclasses.replace(CONFIG, arch=arch)
    inputs = make_inputs()
    predicted = network.distribution(network.init(config, SIZES, 0), config, SIZES, inputs)
    np.testing.assert_allclose(predicted, jnp.exp(inputs.prior), rtol=1e-5)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_each_layer_sees_the_routing_it_may_and_no_other(arch):
    """The gradient of every layer's prediction by every layer's true routing is zero exactly where it is hidden."""
    config = dataclasses.replace(CONFIG, arch=arch, members=1)
    weights = {name: leaf[0] for name, leaf in trained_weights(config).items()}
    inputs = make_inputs(1)
    visible = np.zeros((1, 4, 4), bool)
    order = [2, 0, 3, 1] if arch != "gpt2" else [0, 1, 2, 3]
    for place, layer in enumerate(order):
        visible[0, layer, order[:place]] = True

    def predict(routing: jax.Array) -> jax.Array:
        return network.member_logits(weights, config, SIZES, inputs, Known(routing, jnp.asarray(visible)))[0]

    slopes = jax.jit(jax.jacfwd(predict))(jax.random.normal(jax.random.key(3), (1, 4, 8)))  # [M, E, 1, M, E]
    depends = np.abs(np.asarray(slopes)).max(axis=(1, 2, 4)) > 0
    np.testing.assert_array_equal(depends, visible[0])


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_knowing_nothing_is_the_same_with_and_without_the_streams_for_it(arch):
    config = dataclasses.replace(CONFIG, arch=arch)
    weights, inputs = trained_weights(config), make_inputs()
    plain = network.distribution(weights, config, SIZES, inputs)
    nothing = Known(jnp.ones((2, 4, 8)), jnp.zeros((2, 4, 4), bool))
    np.testing.assert_allclose(plain, network.distribution(weights, config, SIZES, inputs, nothing), atol=1e-5)


def test_only_gpt2_hides_later_layers_inputs():
    for arch in ARCHITECTURES:
        config = dataclasses.replace(CONFIG, arch=arch)
        weights, inputs = trained_weights(config), make_inputs()
        changed = inputs._replace(layers=inputs.layers.at[:, 3].add(1.0))
        before, after = (network.distribution(weights, config, SIZES, given) for given in (inputs, changed))
        same = bool(jnp.allclose(before[:, :3], after[:, :3], atol=1e-6))
        assert same == (arch == "gpt2")


def test_an_experts_number_means_nothing_across_layers():
    """Renaming one layer's experts, in its inputs and in its matrices, renames its output, and no other layer's."""
    weights, inputs = trained_weights(CONFIG), make_inputs()
    routing = jax.random.normal(jax.random.key(5), (2, 4, 8))
    visible = jnp.tril(jnp.ones((2, 4, 4), bool), -1)
    order = np.random.default_rng(0).permutation(8)
    plain = network.distribution(weights, CONFIG, SIZES, inputs, Known(routing, visible))
    columns = np.concatenate([channel * 8 + order for channel in range(CHANNELS)])

    def renamed(name: str, leaf: jax.Array) -> jax.Array:
        rows = {"channels.kernel": columns, "truth.kernel": order}
        if name in rows:
            return leaf.at[:, 1].set(leaf[:, 1][:, rows[name]])
        if name == "head.kernel":
            return leaf.at[:, 1].set(leaf[:, 1][..., order])
        return leaf.at[:, 1].set(leaf[:, 1][:, order]) if name == "head.bias" else leaf

    others = {name: renamed(name, leaf) for name, leaf in weights.items()}
    strange = inputs._replace(
        prior=inputs.prior.at[:, 1].set(inputs.prior[:, 1][:, order]),
        layers=inputs.layers.at[:, 1].set(inputs.layers[:, 1][..., order]),
    )
    known = Known(routing.at[:, 1].set(routing[:, 1][:, order]), visible)
    result = network.distribution(others, CONFIG, SIZES, strange, known)
    np.testing.assert_allclose(result[:, 1], plain[:, 1][:, order], atol=1e-5)
    np.testing.assert_allclose(result[:, [0, 2, 3]], plain[:, jnp.array([0, 2, 3])], atol=1e-5)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_no_layer_may_see_itself_in_training(arch):
    for variant in ("all-layer", "layer-by-layer"):
        config = dataclasses.replace(CONFIG, arch=arch, variant=variant)
        given = jnp.arange(64) % 2 == 0
        visible = objective.visible_layers(config, given, jax.random.key(0))
        assert not visible[:, jnp.arange(4), jnp.arange(4)].any()
        assert visible.any()
        if variant == "layer-by-layer":
            np.testing.assert_array_equal(visible, jnp.tril(jnp.ones((4, 4), bool), -1)[None] & given[:, None, None])
        else:
            assert 0.2 < float((~visible.any((1, 2))).mean()) < 0.8


def test_soft_coverage_follows_hard_coverage():
    logits = 3 * jax.random.normal(jax.random.key(0), (5, 4, 8))
    target = jax.nn.softmax(jax.random.normal(jax.random.key(1), (5, 4, 8)))
    soft = objective.soft_coverage(logits, target, 3, 1e-3)
    np.testing.assert_allclose(soft, objective.hard_coverage(logits, target, 3), atol=2e-3)
    slope = jax.grad(lambda x: objective.soft_coverage(x, target, 3, 0.5).sum())(logits)
    before, after = (objective.soft_coverage(x, target, 3, 0.5).sum() for x in (logits, logits + slope))
    assert after > before


def test_weights_survive_a_file_and_fit_only_their_configuration(tmp_path):
    weights = trained_weights(CONFIG)
    network.save(weights, tmp_path / "w.safetensors")
    loaded = network.load(tmp_path / "w.safetensors", CONFIG, SIZES)
    for name, leaf in weights.items():
        np.testing.assert_array_equal(leaf, loaded[name])
    with pytest.raises(PredictorError, match="does not fit"):
        network.load(tmp_path / "w.safetensors", dataclasses.replace(CONFIG, width=16), SIZES)
    whole = (tmp_path / "w.safetensors").read_bytes()
    (tmp_path / "w.safetensors").write_bytes(whole[:100])
    with pytest.raises(PredictorError, match="damaged"):
        network.load(tmp_path / "w.safetensors", CONFIG, SIZES)
