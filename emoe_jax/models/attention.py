"""Grouped-query attention over keys and values that are already in place."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def attention_mask(
    query_positions: Int[Array, "B T"], key_positions: Int[Array, " S"], window: int | None
) -> Bool[Array, "B T S"]:
    """A query sees keys at its own position and before, at most `window` of them."""
    distance = query_positions[:, :, None] - key_positions[None, None, :]
    mask = distance >= 0
    return mask if window is None else mask & (distance < window)


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Bool[Array, "B T S"],
    scale: float,
) -> Float[Array, "B T N H"]:
    """Softmax attention in float32; query head `n` reads kv head `n // (N / K)`."""
    B, T, N, H = q.shape
    K = k.shape[2]
    grouped = q.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", grouped, k, preferred_element_type=jnp.float32) * scale
    scores = jnp.where(mask[:, None, None, :, :], scores, jnp.finfo(jnp.float32).min)
    probs = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("BKGTS,BSKH->BTKGH", probs, v).reshape(B, T, N, H)
