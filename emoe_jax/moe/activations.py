"""The elementwise nonlinearities inside a Triton kernel, in float32.

Triton has no error function, and its maximum of NaN and a number is the number, which would hide a NaN.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from emoe_jax.config import ModelConfig
from emoe_jax.models.decoder import activation_function, gate_parts

_ERF_NUMERATOR = (
    0.00022905065861350646,
    0.0034082910107109506,
    0.050955695062380861,
    0.18520832239976145,
    1.128379143519084,
)
_ERF_DENOMINATOR = (
    -1.1791602954361697e-7,
    0.000023547966471313185,
    0.0010179625278914885,
    0.014070470171167667,
    0.11098505178285362,
    0.49746925110067538,
    1.0,
)
_ERF_LIMIT = 3.832506856900711
"""Beyond it the error function is 1 in float32."""


def gate_in_kernel(parts: Sequence[Float[Array, "..."]], config: ModelConfig) -> Float[Array, "..."]:
    """`emoe_jax.models.decoder.gate` of the products of gate (or both gates) and up."""
    special = {"gelu": _gelu, "relu": _relu}
    return gate_parts(parts, config, special.get(config.activation, activation_function(config)))


def _relu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    return jnp.where(x <= 0, 0.0, x)


def _gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    return 0.5 * x * (1 + _erf(x * 2**-0.5))


def _erf(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The error function within 3e-7: the rational approximation that XLA compiles for a float32."""
    x = jnp.clip(x, -_ERF_LIMIT, _ERF_LIMIT)
    square = x * x
    return x * _polynomial(square, _ERF_NUMERATOR) / _polynomial(square, _ERF_DENOMINATOR)


def _polynomial(x: Float[Array, "..."], coefficients: Sequence[float]) -> Float[Array, "..."]:
    """Highest power first, by Horner's rule."""
    total = jnp.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        total = total * x + coefficient
    return total
