"""What stays in host memory: first of all experts that are not on the device."""

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from emoe_jax.experts.host_tier import HostTier

LAYERS, EXPERTS = 2, 4
keys = st.tuples(st.integers(0, LAYERS - 1), st.integers(0, EXPERTS - 1))
record: Any = np.zeros(1)


def residents(*keys: tuple[int, int]) -> np.ndarray:
    mask = np.zeros((LAYERS, EXPERTS), bool)
    for key in keys:
        mask[key] = True
    return mask


def kept(tier: HostTier) -> set[tuple[int, int]]:
    return {(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS) if (layer, expert) in tier}


def test_a_record_of_a_resident_expert_goes_first() -> None:
    tier = HostTier(2, LAYERS, EXPERTS)
    tier.keep((0, 0), record)
    tier.keep((0, 1), record)
    tier.use_residents(residents((0, 1)))
    assert tier.keep((1, 2), record) == 1
    assert kept(tier) == {(0, 0), (1, 2)}
    tier.get((0, 0))
    assert tier.keep((1, 3), record) == 1  # no spare is left: the least recently used one goes
    assert kept(tier) == {(0, 0), (1, 3)}


def test_what_leaves_the_device_is_wanted_before_the_rest() -> None:
    tier = HostTier(3, LAYERS, EXPERTS)
    tier.use_residents(residents((0, 0), (0, 1)))
    tier.fill([(0, 0), (0, 2), (0, 3)])
    assert tier.next_wanted() == (0, 2)
    tier.keep((0, 2), record)
    tier.use_residents(residents((0, 1), (0, 2)))
    assert tier.next_wanted() == (0, 0)
    tier.keep((0, 0), record)
    assert tier.next_wanted() == (0, 3)
    assert tier.next_wanted() is None


def test_nothing_is_wanted_that_would_cost_a_record_that_is_needed() -> None:
    tier = HostTier(1, LAYERS, EXPERTS)
    tier.fill([(0, 2), (0, 3)])
    assert tier.next_wanted() == (0, 2)
    tier.keep((0, 2), record)
    assert tier.next_wanted() is None
    tier.use_residents(residents((0, 2)))  # it was loaded: its record is a spare
    assert tier.next_wanted() == (0, 3)
    assert tier.keep((0, 3), record) == 1
    assert kept(tier) == {(0, 3)}


@given(
    most=st.integers(0, 5),
    events=st.lists(st.tuples(st.sampled_from(["keep", "get", "residents", "fill"]), keys), max_size=40),
)
def test_the_budget_holds_and_spares_go_first(most: int, events: list[tuple[str, tuple[int, int]]]) -> None:
    tier = HostTier(most, LAYERS, EXPERTS)
    mask = residents()
    tier.fill([(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)])
    for what, key in events:
        before = kept(tier)
        if what == "keep":
            tier.keep(key, record)
            lost = before - kept(tier)
            assert all(mask[one] for one in lost) or not any(mask[one] for one in kept(tier))
        elif what == "get":
            assert (tier.get(key) is not None) == (key in before)
        elif what == "residents":
            mask = mask.copy()
            mask[key] ^= True
            tier.use_residents(mask)
            assert kept(tier) == before
        elif (wanted := tier.next_wanted()) is not None:
            assert not mask[wanted]
            assert wanted not in before
            tier.keep(wanted, record)
            assert all(mask[one] for one in before - kept(tier))
            assert wanted in kept(tier)
        assert len(tier) == len(kept(tier)) <= most
