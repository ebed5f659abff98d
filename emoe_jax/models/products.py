"""Products of rows with a matrix that is stored as checkpoints have it, `[out, in]`."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from emoe_jax.platforms import default_platform

LEFT_FACTOR_ROWS = 64
"""Rows up to which XLA:CPU multiplies faster with the matrix as its left factor: at 2 to 8 rows in half the time
(measured at 8192 x 1024, float32)."""


def times_transposed(
    x: Float[Array, "... I"], weight: Float[Array, "O I"], dtype: jnp.dtype | None = None
) -> Float[Array, "... O"]:
    """`x W^T`, in `dtype` or that of the factors."""
    rows = math.prod(x.shape[:-1])
    if default_platform() != "cpu" or not 1 < rows <= LEFT_FACTOR_ROWS:
        return jnp.einsum("...i,oi->...o", x, weight, preferred_element_type=dtype)
    product = jnp.dot(weight, x.reshape(rows, -1).T, preferred_element_type=dtype)
    # Without the barrier XLA swaps the factors back.
    return jax.lax.optimization_barrier(product).T.reshape(*x.shape[:-1], -1)
