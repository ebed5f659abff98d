"""In the tests an array that JAX would promote to another rank or dtype is an error, as `tests/conftest.py` asks."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest

from emoe_jax.attention.sums import attention_mask
from emoe_jax.models.modules import RMSNorm


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda: jnp.ones((2, 3)) + jnp.ones(3), "rank_promotion='raise'"),
        (lambda: jnp.ones(3, jnp.bfloat16) * jnp.ones(3, jnp.float32), "dtype_promotion=strict"),
        (lambda: jnp.ones(3, jnp.int32) * 0.5, "dtype_promotion=strict"),
        (lambda: jnp.ones(3) * jnp.ones(3, bool), "dtype_promotion=strict"),
    ],
)
def test_a_promotion_raises(function: Callable[[], jax.Array], message: str, compiled: bool) -> None:
    with pytest.raises(ValueError, match=message):
        jax.jit(function)() if compiled else function()


def test_code_of_the_library_is_seen() -> None:
    """Weights of another dtype than the rows, and times of another one, would be promoted."""
    norm = RMSNorm(4, 1e-6)
    assert norm(jnp.ones((2, 3, 4))).shape == (2, 3, 4)
    with pytest.raises(ValueError, match="dtype_promotion=strict"):
        norm(jnp.ones((2, 3, 4), jnp.bfloat16))
    with pytest.raises(ValueError, match="dtype_promotion=strict"):
        attention_mask(jnp.zeros((1, 2), jnp.int32), jnp.zeros(3, jnp.int16), None)
