"""Eight-bit weights: how far rounding may take a weight, whatever the weights are."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from emoe_jax.experts.quantise import dequantise_into, quantised

TINY = np.finfo(np.float32).tiny
WEIGHTS = arrays.arrays(
    np.float32,
    arrays.array_shapes(min_dims=2, max_dims=2, max_side=9),
    elements=st.floats(-(2.0**127), 2.0**127, width=32) | st.floats(-1, 1, width=32),
)


def there_and_back(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    numbers, scales = quantised(weights)
    back = np.empty(weights.shape, np.float32)
    dequantise_into(numbers, scales, back)
    return numbers, scales, back


@given(WEIGHTS)
def test_a_weight_is_within_half_a_scale_of_its_channel(weights: np.ndarray) -> None:
    numbers, scales, back = there_and_back(weights)
    assert np.abs(numbers.astype(int)).max() <= 127
    assert np.isfinite(scales).all()
    largest = np.abs(weights.astype(np.float64)).max(axis=1)
    np.testing.assert_allclose(scales, largest / 127, rtol=1e-6, atol=1e-44)
    error = np.abs(back.astype(np.float64) - weights).max(axis=1)
    # Half a scale, and what float32 rounds of products of this size. Subnormal scales are coarser.
    assert (error <= largest / 254 * (1 + 1e-4) + largest * 1e-6 + TINY).all()


@given(WEIGHTS)
def test_the_sign_stays_and_the_largest_of_a_channel_is_127(weights: np.ndarray) -> None:
    numbers, scales, back = there_and_back(weights)
    assert (back * weights.astype(np.float64) >= 0).all()
    is_normal = scales > TINY
    np.testing.assert_array_equal(np.abs(numbers.astype(int)).max(axis=1)[is_normal], 127)


@given(WEIGHTS, st.integers(0, 99))
def test_channels_do_not_depend_on_each_other(weights: np.ndarray, seed: int) -> None:
    order = np.random.default_rng(seed).permutation(len(weights))
    numbers, scales = quantised(weights)
    np.testing.assert_array_equal(quantised(weights[order])[0], numbers[order])
    np.testing.assert_array_equal(quantised(weights[order])[1], scales[order])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16, np.float32])
def test_what_is_quantised_already_stays_as_it_is(dtype: type) -> None:
    """Weights that are multiples of a power of two are exact in every dtype, and so are their numbers."""
    numbers = np.random.default_rng(0).integers(-127, 128, (40, 700)).astype(np.int8)
    numbers[:, 3] = 127
    weights = (numbers * np.float32(2**-9)).astype(dtype)
    again, scales, back = there_and_back(weights)
    np.testing.assert_array_equal(again, numbers)
    np.testing.assert_array_equal(scales, np.float32(2**-9))
    np.testing.assert_array_equal(back, weights.astype(np.float32))


def test_a_channel_of_zeros_has_no_scale() -> None:
    numbers, scales, back = there_and_back(np.zeros((2, 5), np.float32))
    assert not numbers.any()
    assert not scales.any()
    assert not back.any()
