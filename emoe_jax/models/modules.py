"""The modules that all parts of the decoder are made of: a linear map, and a norm."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from emoe_jax.models.products import times_transposed

INIT_STDDEV = 0.02


class Linear(nnx.Module):
    """`y = x W^T (+ b)` with the weight stored `[out, in]`, as checkpoints have it."""

    def __init__(self, in_features: int, out_features: int, *, rngs: nnx.Rngs, bias: bool = False):
        self.weight = nnx.Param(jax.random.normal(rngs.params(), (out_features, in_features)) * INIT_STDDEV)
        self.bias = nnx.Param(jnp.zeros((out_features,))) if bias else None

    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        y = times_transposed(x, self.weight[...])
        return y if self.bias is None else y + _for_last_axis(self.bias[...], y)


class RMSNorm(nnx.Module):
    """Statistics in float32, cast back, then the weight: the order checkpoints were trained with."""

    def __init__(self, size: int, eps: float):
        self.weight = nnx.Param(jnp.ones((size,)))
        self.eps = eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return _for_last_axis(self.weight[...], x) * x32.astype(x.dtype)


def _for_last_axis(vector: Array, like: Array) -> Array:
    """A vector with axes of size 1 in front, so that it has the rank of the array whose last axis it goes along."""
    return jnp.expand_dims(vector, tuple(range(like.ndim - 1)))
