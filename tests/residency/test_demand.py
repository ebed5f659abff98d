import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emoe_jax.residency.capacities import split_slots
from emoe_jax.residency.demand import Demand, RequestProgress, expected_rates, expected_tokens, mean_sensitivity
from emoe_jax.traces.coverage import coverage

M, E = 3, 5


def shares_of(*first: float) -> np.ndarray:
    """Every layer has these shares of its first experts, the rest going to the last."""
    row = np.zeros(E)
    row[: len(first)] = first
    row[-1] += 1 - row.sum()
    return np.tile(row, (M, 1))


def tokens(requests: list[Demand]) -> np.ndarray:
    """`W_j + W_o` of requests that have not begun."""
    return np.array([request.tokens_left(RequestProgress()) for request in requests])


def test_equation_2_by_hand():
    sensitivity = np.array([0.0, 0.5, 1.0])
    tasks = [Demand(10, 4.0, sensitivity, shares_of(0.75)), Demand(30, 4.0, sensitivity, shares_of(0.75))]
    other = Demand(5, 1.0, np.ones(M), shares_of(0.0, 1.0))
    expected = ((10 + 30) + 2 * 4.0) * sensitivity[:, None] * shares_of(0.75) + 6.0 * shares_of(0.0, 1.0)
    requests = [*tasks, other]
    np.testing.assert_allclose(expected_tokens(requests, tokens(requests)), expected)


def test_what_is_computed_needs_no_experts_any_more():
    request = Demand(10, 4.0, np.ones(M), shares_of(0.75))
    states = [(0, 0), (6, 0), (10, 1), (10, 3), (10, 4), (10, 9)]
    assert [request.tokens_left(RequestProgress(*state)) for state in states] == [14, 8, 3, 1, 1, 1]
    long = dataclasses.replace(request, output_tokens=100.0)
    assert [long.tokens_left(RequestProgress(10, generated)) for generated in (99, 100, 103, 105)] == [1, 5, 2, 5]


def test_rates_are_top_k_per_request_in_the_proportions_of_equation_2():
    long, short = Demand(90, 10.0, np.ones(M), shares_of(1.0)), Demand(15, 10.0, np.ones(M), shares_of(0.0, 1.0))
    rates = expected_rates([long, short], tokens([long, short]), top_k=2)
    np.testing.assert_allclose(rates.sum(axis=1), 4)
    np.testing.assert_allclose(rates[:, 0] / rates[:, 1], 100 / 25)


def test_a_layer_that_nobody_is_sensitive_to_keeps_a_prior():
    request = Demand(10, 1.0, np.array([0.0, 1.0, 1.0]), shares_of(0.5, 0.25))
    rates = expected_rates([request], tokens([request]), 2)
    np.testing.assert_allclose(rates[0], rates[1])
    np.testing.assert_allclose(mean_sensitivity([request], tokens([request])), [0, 1, 1])


shares = st.integers(0, 2**31).map(lambda seed: np.random.default_rng(seed).dirichlet(np.full(E, 0.3), size=(2, M)))


@settings(max_examples=60, deadline=None)
@given(shares, st.integers(M * 1, M * E))
def test_a_split_keeps_to_the_bounds_and_no_move_of_a_slot_gains(shares, total):
    split = split_slots(total, shares, fewest=1)
    assert sum(split) == total
    assert all(1 <= slots <= E for slots in split)
    best = coverage(shares, shares, split).mean()
    for giver in range(M):
        for taker in range(M):
            moved = list(split)
            moved[giver] -= 1
            moved[taker] += 1
            if giver != taker and moved[giver] >= 1 and moved[taker] <= E:
                assert coverage(shares, shares, moved).mean() <= best + 0.002 + 1e-9


def test_layers_that_spread_get_more_slots():
    concentrated, spread = np.eye(E)[:1], np.full((1, E), 1 / E)
    shares = np.stack([concentrated[0], spread[0], spread[0]])[None]
    assert split_slots(9, shares, fewest=1) == [1, 4, 4] or sum(split_slots(9, shares, fewest=1)[1:]) == 8


def test_an_even_split_stays_where_nothing_is_gained():
    assert split_slots(6, np.full((1, M, E), 1 / E), fewest=1) == [2, 2, 2]


@pytest.mark.parametrize("total", [2, M * E + 1])
def test_slots_out_of_bounds_are_refused(total):
    with pytest.raises(ValueError, match="slots"):
        split_slots(total, np.full((1, M, E), 1 / E), fewest=1)
