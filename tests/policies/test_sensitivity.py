"""How much a wrong expert harms in a layer decides which layers exchange experts first, and which never do."""

import numpy as np
import pytest

from emoe_jax.policies import make_policy
from emoe_jax.policies.rule import ExpectedWishes
from tests.policies.test_policy import filled_table


def test_gains_count_by_the_sensitivity_of_their_layer():
    policy = make_policy("lfu", 3, 4)
    table = filled_table(policy, [2, 2, 2])
    nothing = np.zeros((3, 4), np.float32)
    policy.plan(ExpectedWishes(nothing, nothing, 1.0, np.array([0.25, 1.0, 0.0])))
    policy.observe(np.array([[0, 0, 9, 0], [0, 0, 3, 0], [0, 0, 9, 0]]))
    swaps = policy.swaps(table.resident_mask)
    assert [swap.layer for swap in swaps] == [1, 0]
    assert policy.layers_spared == 1
    assert swaps[1].gain == pytest.approx(0.75 * swaps[0].gain)
