import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emoe_jax.experts.table import EMPTY, SlotTable


def test_worked_example():
    table = SlotTable([2, 3], num_experts=4)
    assert table.assign(0, 1, 3) is None
    assert table.assign(0, 1, 2) == 3
    assert table.assign(1, 0, 3) is None
    np.testing.assert_array_equal(table.slot_of_expert, [[2, 2, 1, 2], [3, 3, 3, 0]])
    np.testing.assert_array_equal(table.expert_of_slot(0), [EMPTY, 2])
    np.testing.assert_array_equal(table.resident(1), [3])
    assert table.empty_slots(1) == [1, 2]
    assert table.resident_mask.sum() == 2


def test_refusals_change_nothing():
    table = SlotTable([2], num_experts=4)
    table.assign(0, 0, 1)
    before = table.slot_of_expert.copy()
    with pytest.raises(ValueError, match="already in slot 0; slot 1 would hold a duplicate"):
        table.assign(0, 1, 1)
    with pytest.raises(IndexError, match="slot 2 of layer 0 is not one of 2"):
        table.assign(0, 2, 2)
    with pytest.raises(IndexError, match="slot -1"):
        table.assign(0, -1, 2)
    with pytest.raises(IndexError, match="expert 4 is not one of 4"):
        table.assign(0, 1, 4)
    with pytest.raises(IndexError, match="slot 2 of layer 0 is not one of 2"):
        table.release(0, 2)
    np.testing.assert_array_equal(table.slot_of_expert, before)
    with pytest.raises(ValueError, match=r"\[5\] must lie between 1 and the 4"):
        SlotTable([5], num_experts=4)


def test_device_table_is_transferred_only_after_a_change():
    table = SlotTable([2, 1], num_experts=3)
    first = table.device_table()
    assert table.device_table() is first
    table.assign(0, 0, 2)
    second = table.device_table()
    assert second is not first
    np.testing.assert_array_equal(second, [[2, 2, 0], [1, 1, 1]])
    np.testing.assert_array_equal(first, [[2, 2, 2], [1, 1, 1]])  # a snapshot, not a window
    table.release(0, 0)
    np.testing.assert_array_equal(table.device_table(), [[2, 2, 2], [1, 1, 1]])


def test_views_cannot_be_written():
    table = SlotTable([2], num_experts=3)
    for view in (table.slot_of_expert, table.expert_of_slot(0), table.resident_mask):
        with pytest.raises(ValueError, match="read-only"):
            view[0] = 0


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_both_directions_always_agree(data: st.DataObject):
    num_experts = data.draw(st.integers(1, 6))
    capacities = data.draw(st.lists(st.integers(1, num_experts), min_size=1, max_size=3))
    table = SlotTable(capacities, num_experts)
    for _ in range(data.draw(st.integers(0, 20))):
        layer = data.draw(st.integers(0, len(capacities) - 1))
        slot = data.draw(st.integers(0, capacities[layer] - 1))
        expert = data.draw(st.integers(0, num_experts - 1))
        if table.is_resident(layer, expert):
            continue
        held = int(table.expert_of_slot(layer)[slot])
        assert table.assign(layer, slot, expert) == (None if held == EMPTY else held)
    for layer, capacity in enumerate(capacities):
        for expert in range(num_experts):
            slot = table.slot(layer, expert)
            assert slot == capacity or table.expert_of_slot(layer)[slot] == expert
        assert len(table.resident(layer)) == (table.slot_of_expert[layer] < capacity).sum()
        assert len(table.empty_slots(layer)) == capacity - len(table.resident(layer))
