"""The experts that fill a layer's slots, and what they cover, against a plain count."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emoe_jax.traces.coverage import best_experts, coverage, covered, expected_coverage

CAPACITIES = (3, 5, 1)
M, E = len(CAPACITIES), 8


def test_worked_example() -> None:
    wishes, scores = np.array([[3, 1, 0, 4]]), np.array([[0.4, 0.1, 0.3, 0.2]])
    assert best_experts(scores, [2]).tolist() == [[True, False, True, False]]
    assert coverage(wishes, scores, [2]) == 0.375


def test_ties_go_to_the_lower_index_and_a_whole_layer_fits() -> None:
    assert best_experts(np.ones((2, 4)), [2, 4]).tolist() == [[True, True, False, False], [True] * 4]


@given(st.integers(0, 2**31), st.sampled_from([(), (3,), (2, 4)]))
def test_covered_are_the_wishes_for_the_largest_scores(seed: int, cases: tuple[int, ...]) -> None:
    rng = np.random.default_rng(seed)
    wishes, scores = rng.integers(0, 9, (*cases, M, E)) + 1, rng.random((*cases, M, E)).round(1)
    found, shares = covered(wishes, scores, CAPACITIES), coverage(wishes, scores, CAPACITIES)
    assert found.shape == shares.shape == cases
    for case in np.ndindex(*cases):
        expected = 0
        for layer, capacity in enumerate(CAPACITIES):
            ranked = sorted(range(E), key=lambda expert, row=scores[case][layer]: -row[expert])
            expected += sum(int(wishes[case][layer][expert]) for expert in ranked[:capacity])
        assert found[case] == expected
        assert shares[case] == pytest.approx(expected / wishes[case].sum())


def test_expected_coverage_by_hand():
    resident = np.array([[True, False, True], [False, True, False]])
    assert expected_coverage(np.array([[0.5, 0.3, 0.2]]), resident[:1]) == 0.7
    assert expected_coverage(np.array([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]), resident) == pytest.approx((0.7 + 0.1) / 2)
