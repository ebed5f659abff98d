"""Initial weights: random, but with attention that starts out able to find a name again and copy it.

Copying from the context needs two layers that work together: heads that tell a token what came before it, and heads
that look for the current token among what the others were told, so that they find what followed it last time
(induction heads, Olsson et al. 2022). From plain random weights such a pair takes tens of millions of tokens to arise,
more than this model sees. Here layer 0 and layer 1 start as that pair, and the layers above start with one group of
heads that looks for like tokens and with values that pass through unchanged (mimetic initialisation, Trockman and
Kolter 2023). Everything is then trained like any other weight.

For this the embedding has one direction that all tokens share (`common`): queries and keys that read it depend on
positions alone, and those that do not read it on tokens alone. Rotary pairs that turn fast serve the former, pairs that
hardly turn within a context the latter.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from emoe_jax.config import ModelConfig
from emoe_jax.experts.weights import ExpertWeights
from emoe_jax.models.decoder import Decoder, init_experts
from emoe_jax.models.rope import inverse_frequencies

_EMBEDDING_STDDEV = 0.1
_COMMON = 0.6  # length of the direction that all embeddings share; the rest of an embedding is about 1.1 long
_PREVIOUS_SCORE = 40.0  # attention logit of the token before, in layer 0
_MATCH_SCORE = 16.0  # attention logit of a token that follows an equal one, in layer 1
_GAINS = (0.15, 0.2, 0.075)  # of what attention adds to the residual stream: layers 0, 1, and all others
_VALUE_SCALE = 0.35  # of an orthogonal value matrix; the output matrix is larger in turn, so that Adam moves both alike
_DECODER_STDDEV = 0.02  # what `Decoder` and `init_experts` draw


def dense_weights(config: ModelConfig, seed: int) -> dict[str, Array]:
    """All arrays of the decoder by path."""
    rng = np.random.default_rng(seed)
    state = nnx.to_flat_state(nnx.state(Decoder(config, rngs=nnx.Rngs(seed)), nnx.Param))
    dense = {".".join(map(str, path)): variable[...] for path, variable in state}
    common = rng.normal(size=config.hidden_size)
    common /= np.linalg.norm(common)
    for name, value in dense.items():
        if name == "embedding":
            table = np.asarray(value) * (_EMBEDDING_STDDEV / _DECODER_STDDEV)
            dense[name] = jnp.asarray(table - np.outer(table @ common, common) + _COMMON * common, jnp.float32)
        elif value.ndim == 2:
            dense[name] = value * (value.shape[1] ** -0.5 / _DECODER_STDDEV)
    for layer, (qkv, out) in enumerate(_attention(config, common, rng)):
        dense[f"layers.{layer}.self_attention.qkv.weight"] = jnp.asarray(qkv, jnp.float32)
        dense[f"layers.{layer}.self_attention.out.weight"] = jnp.asarray(out, jnp.float32)
    return dense


def expert_weights(config: ModelConfig, seed: int) -> tuple[ExpertWeights, ...]:
    """Random by fan-in; what writes to the residual stream is smaller with depth."""
    wide = config.hidden_size**-0.5 / _DECODER_STDDEV
    narrow = (2 * config.num_layers * config.expert_hidden) ** -0.5 / _DECODER_STDDEV
    layers = init_experts(config, jax.random.key(seed + 1))
    return tuple(ExpertWeights(layer.w_in * wide, layer.w_out * narrow) for layer in layers)


def _attention(
    config: ModelConfig, common: Float[np.ndarray, " D"], rng: np.random.Generator
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Per layer the fused `qkv` [(N + 2K) * H, D] and `out` [D, N * H]."""
    N, K, H, D = config.num_heads, config.num_kv_heads, config.head_dim, config.hidden_size
    turns = inverse_frequencies(config.rope, H)
    layers = []
    q, k = _noise(rng, N, H, D), _noise(rng, K, H, D)
    _look_back(q, k, common, turns)
    value, out = _orthogonal(rng, D)[: K * H], _orthogonal(rng, D)[:, : K * H]
    layers.append(_fused(config, q, k, value, out, _GAINS[0]))
    told = out @ value  # what layer 0 writes for a previous token
    q, k = _noise(rng, N, H, D), _noise(rng, K, H, D)
    _look_for_told(q, k, told, common, turns, rng)
    value = _orthogonal(rng, D)[: K * H]
    layers.append(_fused(config, q, k, value, value.T, _GAINS[1]))
    for _ in range(2, config.num_layers):
        q, k = (rng.normal(size=(heads, H, D)) * D**-0.5 for heads in (N, K))
        k[0] = q[0]
        value = _orthogonal(rng, D)[: K * H]
        layers.append(_fused(config, q, k, value, value.T, _GAINS[2]))
    return layers[: config.num_layers]


def _look_back(
    q: Float[np.ndarray, "N H D"], k: Float[np.ndarray, "K H D"], common: np.ndarray, turns: np.ndarray
) -> None:
    """Add to all heads: attend to the token before. Pair `f` of a query and of a key `n` positions before it are
    `(a, 0)` and `(a, 0)` turned by one position ahead, so that their product, `a^2 cos(turns[f] * (n - 1))`, peaks
    at n = 1."""
    H, D = q.shape[1:]
    read = _COMMON / np.sqrt((_EMBEDDING_STDDEV**2 * D + _COMMON**2) / D)  # a normed embedding along `common`
    fast = np.flatnonzero(turns > 0.15)
    a = np.sqrt(_PREVIOUS_SCORE / len(fast) * np.sqrt(H)) / read
    for f in fast:
        q[:, f] += a * common
        k[:, f] += a * np.cos(turns[f]) * common
        k[:, f + H // 2] += a * np.sin(turns[f]) * common


def _look_for_told(
    q: Float[np.ndarray, "N H D"],
    k: Float[np.ndarray, "K H D"],
    told: Float[np.ndarray, "D D"],
    common: np.ndarray,
    turns: np.ndarray,
    rng: np.random.Generator,
) -> None:
    """Add to all heads: attend to tokens that were told of a token like the current one, by random projections."""
    H, D = q.shape[1:]
    slow = np.flatnonzero(turns < 0.01)
    slow = np.concatenate([slow, slow + H // 2])
    group = len(q) // len(k)
    for j in range(len(k)):
        look = rng.normal(size=(len(slow), D))
        look -= np.outer(look @ common, common)
        look *= np.sqrt(_MATCH_SCORE * np.sqrt(H) / (len(slow) * 0.35 * D))  # a normed embedding is 0.35 D squared here
        q[j * group : (j + 1) * group, slow] += look
        k[j, slow] += look @ told.T


def _fused(
    config: ModelConfig, q: np.ndarray, k: np.ndarray, value: np.ndarray, out: np.ndarray, gain: float
) -> tuple[np.ndarray, np.ndarray]:
    """Checkpoint layout; the query heads of a group share the output block of their kv head."""
    K, H, D = config.num_kv_heads, config.head_dim, config.hidden_size
    group = config.num_heads // K
    qkv = np.concatenate([q.reshape(-1, D), k.reshape(-1, D), _VALUE_SCALE * value])
    blocks = np.repeat(out.reshape(D, K, 1, H), group, axis=2).reshape(D, -1)
    return qkv, gain / (_VALUE_SCALE * group) * blocks


def _noise(rng: np.random.Generator, heads: int, head_dim: int, hidden: int) -> Float[np.ndarray, "heads H D"]:
    return rng.normal(size=(heads, head_dim, hidden)) * 0.02


def _orthogonal(rng: np.random.Generator, size: int) -> Float[np.ndarray, "D D"]:
    return np.linalg.qr(rng.normal(size=(size, size)))[0]
