"""The initial attention: layer 0 looks one token back, layer 1 finds what followed an equal token."""

import jax
import jax.numpy as jnp
import numpy as np

from emoe_jax.models.rope import Rotation
from train.demo import objective, shape
from train.demo.attention import attend_packed, causal_within_documents


def test_the_first_two_layers_start_as_an_induction_circuit():
    config = shape.model_config(num_hidden_layers=2, num_local_experts=2, num_experts_per_tok=2, vocab_size=200)
    parameters = objective.init(config, 0)

    @jax.jit
    def attention(tokens):
        model = objective.decoder(config, parameters.dense)
        x, patterns = model.embed(tokens), []
        rotation = Rotation.of(jnp.arange(tokens.shape[1])[None], config)
        mask = causal_within_documents(jnp.ones(tokens.shape, int))
        for layer in model.layers:
            q, k, _ = layer.self_attention.project(layer.input_norm(x), rotation)
            scores = jnp.einsum("BTNH,BSNH->BNTS", q, jnp.repeat(k, 2, axis=2))
            patterns.append(jnp.argmax(jnp.where(mask[:, None], scores, -jnp.inf), axis=-1)[0])
            x, _ = layer.attention(
                x, rotation, lambda q, k, v, _: (attend_packed(q, k, v, mask, config.attention_scale), None)
            )
        return patterns

    once = np.random.default_rng(0).permutation(200)[:16]
    back, match = (np.asarray(pattern) for pattern in attention(jnp.array([[*once, *once]])))
    assert np.mean(back[:, 1:] == np.arange(31)) > 0.9
    followed = np.arange(16, 31) - 15
    assert np.mean(match[:, 16:31] == followed) > 0.5  # by chance it would be 0.04
