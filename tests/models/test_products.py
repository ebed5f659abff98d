"""Products with `[out, in]` matrices are the same whichever factor is the left one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emoe_jax.models.products import LEFT_FACTOR_ROWS, times_transposed
from emoe_jax.platforms import default_platform, tracing_for


@pytest.mark.parametrize("shape", [(5,), (1, 5), (2, 5), (3, 4, 5), (LEFT_FACTOR_ROWS, 5), (LEFT_FACTOR_ROWS + 1, 5)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_is_the_product(shape: tuple[int, ...], dtype: str) -> None:
    x = jax.random.normal(jax.random.key(0), shape, dtype)
    weight = jax.random.normal(jax.random.key(1), (7, 5), dtype)
    got = times_transposed(x, weight, jnp.dtype(jnp.float32))
    assert got.dtype == jnp.float32
    expected = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert times_transposed(x, weight).dtype == dtype


def test_only_a_cpu_gets_the_matrix_on_the_left() -> None:
    x, weight = jnp.ones((4, 5)), jnp.ones((7, 5))
    assert default_platform() == "cpu"
    assert "optimization_barrier" in str(jax.make_jaxpr(times_transposed)(x, weight))
    with tracing_for("cuda"):
        assert default_platform() == "cuda"
        assert "optimization_barrier" not in str(jax.make_jaxpr(lambda *factors: times_transposed(*factors))(x, weight))
    assert default_platform() == "cpu"
