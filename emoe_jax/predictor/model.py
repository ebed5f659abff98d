"""The transformer that corrects the prior: MoE layers are its sequence, experts its vocabulary (Flax NNX)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from emoe_jax.predictor.config import PredictorConfig

CHANNELS = 4  # what is known of a layer beforehand: see `Inputs.layers`


class Inputs(NamedTuple):
    """What the network sees of `B` prompts. Frequencies are given as square roots less their mean, see `inputs.py`."""

    prior: Float[Array, "B M E"]  # log of the closed-form distribution that is corrected
    layers: Float[Array, "B M channels E"]  # prior, last prompt, earlier prompts (decayed), first answer tokens
    names: Float[Array, "B name_parts"]
    embedding: Float[Array, "B r"]


class Known(NamedTuple):
    """True routing of some layers, and which layers may see it: `visible[b, i, j]`, layer i sees that of layer j."""

    routing: Float[Array, "B M E"]
    visible: Bool[Array, "B M M"]


class PerLayer(nnx.Module):
    """A linear map for each MoE layer: an expert's number means something else in every layer."""

    def __init__(self, layers: int, inputs: int, outputs: int, rngs: nnx.Rngs):
        self.kernel = nnx.Param(jnp.zeros((layers, inputs, outputs)))
        self.bias = nnx.Param(jnp.zeros((layers, outputs)))

    def __call__(self, x: Float[Array, "B M I"]) -> Float[Array, "B M O"]:
        return jnp.einsum("bmx,mxy->bmy", x, self.kernel[...]) + self.bias[...][None]


class Attention(nnx.Module):
    """Softmax attention; xlnet adds a term for the distance of two layers (Transformer-XL's four terms)."""

    def __init__(self, config: PredictorConfig, rngs: nnx.Rngs):
        self.heads, self.relative = config.heads, config.arch == "xlnet"
        width, head = config.width, config.width // config.heads
        self.qkv = nnx.Linear(width, 3 * width, use_bias=False, rngs=rngs)
        self.out = nnx.Linear(width, width, use_bias=False, rngs=rngs)
        if self.relative:
            self.distance = nnx.Param(jnp.zeros((2 * config.num_layers - 1, config.heads, head)))
            self.content_bias = nnx.Param(jnp.zeros((config.heads, head)))
            self.distance_bias = nnx.Param(jnp.zeros((config.heads, head)))

    def __call__(
        self, x: Float[Array, "B Q D"], keys: int, place: Array, mask: Bool[Array, "#B Q S"]
    ) -> Float[Array, "B Q D"]:
        """Each of `Q` rows attends to the first `keys` rows; `place[Q]` is a row's MoE layer."""
        q, k, v = (
            part.reshape(*x.shape[:2], self.heads, -1) for part in jnp.split(self.qkv(x), 3, axis=-1)
        )  # [B, Q, N, H]
        k, v = k[:, :keys], v[:, :keys]
        if self.relative:
            num_layers = (self.distance.shape[0] + 1) // 2
            between = self.distance[place[:, None] - place[None, :keys] + num_layers - 1]  # [Q, S, N, H]
            scores = jnp.einsum("bqnh,bsnh->bnqs", q + self.content_bias[...][None, None], k)
            scores += jnp.einsum("bqnh,qsnh->bnqs", q + self.distance_bias[...][None, None], between)
        else:
            scores = jnp.einsum("bqnh,bsnh->bnqs", q, k)
        scores = jnp.where(mask[:, None], scores * q.shape[-1] ** -0.5, -1e9)
        mixed = jnp.einsum("bnqs,bsnh->bqnh", jax.nn.softmax(scores, axis=-1), v)
        return self.out(mixed.reshape(x.shape))


class Block(nnx.Module):
    """Pre-norm attention and a feed-forward of twice the width."""

    def __init__(self, config: PredictorConfig, rngs: nnx.Rngs):
        width = config.width
        self.attention_norm = nnx.LayerNorm(width, rngs=rngs)
        self.attention = Attention(config, rngs)
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 2 * width, rngs=rngs)
        self.down = nnx.Linear(2 * width, width, rngs=rngs)

    def __call__(self, x: Array, keys: int, place: Array, mask: Array, drop: Dropout) -> Array:
        x = x + drop(self.attention(self.attention_norm(x), keys, place, mask))
        return x + drop(self.down(jax.nn.gelu(self.up(self.norm(x)))))


class Dropout:
    """Inverted dropout with its own stream of keys; without a key it does nothing."""

    def __init__(self, rate: float = 0.0, key: PRNGKeyArray | None = None):
        self.rate, self.key = rate, key

    def __call__(self, x: Array) -> Array:
        if self.key is None or self.rate == 0:
            return x
        self.key, use = jax.random.split(self.key)
        return jnp.where(jax.random.bernoulli(use, 1 - self.rate, x.shape), x / (1 - self.rate), 0)


class RoutingTransformer(nnx.Module):
    """Logits of every expert in every layer: the closed form's log plus a correction that starts at zero.

    Three streams share the weights (XLNet's two, and one for what is known of a prompt beforehand):
    `memory` holds the inputs of each layer and sees no true routing; `content` also holds the layer's true routing;
    `query` is what predicts: it sees `memory`, and `content` of the layers it may see. Without true routing, `memory`
    alone predicts, and equals what `query` would be.
    """

    def __init__(self, config: PredictorConfig, name_features: int, coordinates: int, rngs: nnx.Rngs):
        width, experts, layers = config.width, config.num_experts, config.num_layers
        self.causal, self.layers = config.arch == "gpt2", layers
        self.channels = PerLayer(layers, CHANNELS * experts, width, rngs)
        self.truth = PerLayer(layers, experts, width, rngs)
        self.names = nnx.Linear(name_features, width, use_bias=False, rngs=rngs)
        self.embedding = nnx.Linear(coordinates, width, use_bias=False, rngs=rngs) if coordinates else None
        self.blocks = nnx.List([Block(config, rngs) for _ in range(config.blocks)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = PerLayer(layers, width, experts, rngs)

    def __call__(self, inputs: Inputs, known: Known | None = None, drop: Dropout | None = None) -> Array:
        """Logits [B, M, E]."""
        drop, layers = drop or Dropout(), self.layers
        batch = inputs.prior.shape[0]
        x = self.channels(drop(inputs.layers.reshape(batch, layers, -1)))
        x = x + self.names(drop(inputs.names))[:, None]
        if self.embedding is not None:
            x = x + self.embedding(drop(inputs.embedding))[:, None]
        before = jnp.tril(jnp.ones((layers, layers), bool)) if self.causal else jnp.ones((layers, layers), bool)
        place = jnp.arange(layers)
        if known is None:
            keys, mask = layers, before[None]
        else:
            x = jnp.concatenate([x, x + self.truth(drop(known.routing)), x], axis=1)  # memory, content, query
            place, keys = jnp.tile(place, 3), 2 * layers
            sees = jnp.broadcast_to(before, known.visible.shape)
            mask = jnp.concatenate(
                [
                    jnp.concatenate([sees, jnp.zeros_like(sees)], axis=2),
                    jnp.concatenate([sees, known.visible | jnp.eye(layers, dtype=bool)[None]], axis=2),
                    jnp.concatenate([sees, known.visible], axis=2),
                ],
                axis=1,
            )
        for block in self.blocks:
            x = block(x, keys, place, mask, drop)
        x = self.norm(x[:, -layers:])
        return inputs.prior + self.head(x)
