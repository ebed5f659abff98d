"""Softmax attention as sums over the keys seen so far. All attention backends are made of it."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

_MASKED = jnp.finfo(jnp.float32).min


def attention_mask(
    query_positions: Int[Array, "B T"], key_positions: Int[Array, " S"], window: int | None
) -> Bool[Array, "B T S"]:
    """A query sees keys at its own position and before, at most `window` of them."""
    distance = query_positions[:, :, None] - key_positions[None, None, :]
    mask = distance >= 0
    return mask if window is None else mask & (distance < window)


class AttentionSums(NamedTuple):
    """Softmax attention over the keys seen so far, by kv head and its group of query heads, in float32.

    Sums are relative to the highest score yet (Milakov and Gimelshein 2018, "Online normalizer calculation for
    softmax"). A masked key adds exactly nothing, whatever its key and value hold: memory that a query must not see may
    be stale and not finite, and 0 times NaN is NaN.
    """

    highest: Float[Array, "B K G T"]
    weight: Float[Array, "B K G T"]
    values: Float[Array, "B K G T Hv"]

    @classmethod
    def zero(cls, q: Float[Array, "B T N H"], kv_heads: int, value_dim: int) -> "AttentionSums":
        """The sums over no keys. `q` gives the shape only; `kv_heads` must divide its `N` heads."""
        B, T, N, _ = q.shape
        rows = (B, kv_heads, N // kv_heads, T)
        return cls(jnp.full(rows, _MASKED), jnp.zeros(rows, jnp.float32), jnp.zeros((*rows, value_dim), jnp.float32))

    def add(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K Hv"],
        mask: Bool[Array, "B T S"],
        scale: float,
    ) -> "AttentionSums":
        """With `S` more keys; query head `n` reads kv head `n // (N / K)`.

        A query that sees a value that is not finite gets NaN, even where that value's weight underflows to 0, and so
        does one that sees no key at all.
        """
        grouped = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3])
        # A GPU would round the operands of float32 products to 10 bits (TF32).
        precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
        product = partial(jnp.einsum, preferred_element_type=jnp.float32, precision=precision)
        scores = product("BTKGH,BSKH->BKGTS", grouped, k) * scale
        scores = jnp.where(mask[:, None, None, :, :], scores, _MASKED)
        highest = jnp.maximum(self.highest, jnp.max(scores, axis=-1))
        kept = jnp.exp(self.highest - highest)
        powers = jnp.where(mask[:, None, None, :, :], jnp.exp(scores - highest[..., None]), 0.0)
        if mask.shape[1] == 1:  # one query: what it does not see is not there
            v = jnp.where(mask[:, 0, :, None, None], v, 0)
            added = product("BKGTS,BSKH->BKGTH", powers.astype(v.dtype), v)
        else:  # a query must not be reached by what only a later one sees
            finite = jnp.isfinite(v)
            v = jnp.where(finite, v, 0)
            added = product("BKGTS,BSKH->BKGTH", powers.astype(v.dtype), v)
            lost = jnp.any(mask & ~jnp.all(finite, axis=(2, 3))[:, None, :], axis=-1)
            added = jnp.where(lost[:, None, None, :, None], jnp.nan, added)
        weight = self.weight * kept + jnp.sum(powers, axis=-1)
        return AttentionSums(highest, weight, self.values * kept[..., None] + added)

    def output(self, dtype: jnp.dtype, sinks: Float[Array, " N"] | None = None) -> Float[Array, "B T N Hv"]:
        """The weighted means in `dtype`, heads in the order of `q`. A query that saw no key gets NaN.

        `sinks` are logits, one per head, of a key more that every query sees and whose value is zero.
        """
        B, K, G, T, width = self.values.shape
        weight, values = self.weight, self.values
        if sinks is not None:
            logits = sinks.astype(jnp.float32).reshape(1, K, G, 1)
            highest = jnp.maximum(self.highest, logits)
            kept = jnp.exp(self.highest - highest)
            weight, values = weight * kept + jnp.exp(logits - highest), values * kept[..., None]
        mean = values / weight[..., None]
        return mean.transpose(0, 3, 1, 2, 4).reshape(B, T, K * G, width).astype(dtype)
