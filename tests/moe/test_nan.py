"""NaN in rows, weights and experts: it reaches the rows that asked for it, and no other."""

import jax.numpy as jnp
import numpy as np
import pytest

from emoe_jax.moe import moe_ffn
from tests.moe.cases import RUNNABLE, Case, model, random_ids


@pytest.mark.parametrize("backend", RUNNABLE)
@pytest.mark.parametrize(("R", "k", "E"), [(3, 2, 4), (40, 2, 8), (300, 1, 5)])
def test_a_row_of_nan_reaches_no_other_row(backend: str, R: int, k: int, E: int) -> None:
    """Neither by its own numbers nor by weights of NaN, with a slab whose unused slots hold NaN."""
    rng = np.random.default_rng(R)
    case = Case.of(model(E, k), random_ids(rng, R, E, k), np.arange(E), E + 1)
    want = case.run(backend)
    others = np.arange(R) != 1
    for lost in ("rows", "weights", "both"):
        spoilt = Case(**vars(case))
        if lost != "weights":
            spoilt.rows = spoilt.rows.at[1].set(jnp.nan)
        if lost != "rows":
            spoilt.weights = spoilt.weights.at[1].set(jnp.nan)
            spoilt.ids = np.where(others[:, None], case.ids, E)
        got = spoilt.run(backend)
        assert np.isnan(got[1]).all()
        np.testing.assert_allclose(got[others], want[others], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("backend", RUNNABLE)
@pytest.mark.parametrize("activation", ["silu", "relu"])
def test_an_expert_of_nan_reaches_only_its_own_rows(backend: str, activation: str) -> None:
    case = Case.of(model(6, 2, activation=activation), [[0, 1], [2, 3], [1, 4], [5, 0]], np.arange(6), 6)
    want = case.run(backend)
    case.w_in[1] = np.nan
    got = case.run(backend)
    np.testing.assert_allclose(got[[1, 3]], want[[1, 3]], rtol=2e-5, atol=2e-5)
    assert np.isnan(got[[0, 2]]).all()


def test_a_lost_row_is_nan_although_no_expert_was_there() -> None:
    """Under `exact` nothing is loaded for it, so no wave holds its experts."""
    config = model(4, 2)
    case = Case.of(config, [[4, 4], [0, 1]], [4, 4, 4, 4], 4)
    weights = case.weights.at[0].set(jnp.nan)
    out = moe_ffn(case.rows, jnp.asarray(case.ids), weights, jnp.asarray(case.slots), case.slab(case.slots, 4), config)
    assert np.isnan(out[0]).all()
    np.testing.assert_array_equal(out[1], np.zeros(32))
