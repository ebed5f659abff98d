import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emoe_jax.errors import ConfigError
from emoe_jax.experts.table import SlotTable
from emoe_jax.policies import POLICIES, PolicyWeights, ResidencyPolicy, Swap, make_policy
from emoe_jax.policies.policy import ChunkWishes
from emoe_jax.policies.rule import ExpectedWishes
from tests.effort import calls_made


def filled_table(policy: ResidencyPolicy, capacities: list[int]) -> SlotTable:
    table = SlotTable(capacities, policy.num_experts)
    for layer, experts in enumerate(policy.initial(capacities)):
        for slot, expert in enumerate(experts):
            table.assign(layer, slot, int(expert))
    return table


def apply(table: SlotTable, swap: Swap) -> None:
    table.assign(swap.layer, table.slot(swap.layer, swap.evict), swap.load)


KNOWLEDGE = PolicyWeights(transitions=np.full((1, 4, 4), 0.25), matrices=np.full((2, 2, 4), 0.25))


@pytest.mark.parametrize("name", sorted(POLICIES.keys() - {"random"}))
def test_initial_set_is_the_most_frequent_or_the_first(name: str):
    assert [e.tolist() for e in make_policy(name, 2, 4, None, KNOWLEDGE).initial([2, 3])] == [[0, 1], [0, 1, 2]]
    frequencies = np.array([[0.1, 0.4, 0.2, 0.3], [0.25, 0.25, 0.25, 0.25]])
    assert [e.tolist() for e in make_policy(name, 2, 4, frequencies, KNOWLEDGE).initial([2, 3])] == [[1, 3], [0, 1, 2]]


def test_bad_names_and_shapes_are_refused():
    with pytest.raises(ConfigError, match="unknown residency policy 'fifo'; expected one of activation-matrix, emoe, "):
        make_policy("fifo", 1, 1)
    with pytest.raises(ConfigError, match=r"shape \[3, 4\]; the model has 2 MoE layers of 4"):
        make_policy("static", 2, 4, np.ones((3, 4)))


def test_static_never_swaps():
    policy = make_policy("static", 1, 4)
    table = filled_table(policy, [2])
    policy.observe(np.array([[0, 0, 9, 9]]))
    assert policy.swaps(table.resident_mask) == []


def test_lru_worked_example():
    policy = make_policy("lru", 1, 4)
    table = filled_table(policy, [2])  # experts 0 and 1
    policy.observe(np.array([[1, 1, 0, 0]]))
    assert policy.swaps(table.resident_mask) == []
    policy.observe(np.array([[1, 0, 0, 2]]))  # 3 is wished for, 1 was not for longest
    (swap,) = policy.swaps(table.resident_mask)
    assert (swap.layer, swap.load, swap.evict) == (0, 3, 1)
    apply(table, swap)
    assert policy.swaps(table.resident_mask) == []
    policy.observe(np.array([[1, 0, 1, 1]]))  # both residents are wished for now, too: nothing to gain
    assert policy.swaps(table.resident_mask) == []


def test_the_limit_is_per_layer_and_gains_are_ordered_over_all():
    policy = make_policy("lru", 2, 8)
    table = filled_table(policy, [4, 4])
    policy.observe(np.array([[0, 0, 0, 0, 1, 2, 3, 0], [1, 1, 1, 0, 9, 0, 0, 0]]))
    assert [(s.layer, s.load) for s in policy.swaps(table.resident_mask, 1)] == [(1, 4), (0, 6)]
    swaps = policy.swaps(table.resident_mask, 8)
    assert [(s.layer, s.load) for s in swaps] == [(1, 4), (0, 6), (0, 5), (0, 4)]
    assert [s.evict for s in swaps if s.layer == 1] == [3]
    assert sorted(-s.gain for s in swaps) == [-s.gain for s in swaps]


def test_experts_under_way_are_left_alone():
    policy = make_policy("lru", 1, 4)
    table = filled_table(policy, [2])
    policy.observe(np.array([[0, 0, 1, 1]]))
    busy = np.array([[True, False, True, False]])
    assert [(s.load, s.evict) for s in policy.swaps(table.resident_mask, 4, busy)] == [(3, 1)]
    assert policy.swaps(table.resident_mask, 4, np.ones((1, 4), bool)) == []


def test_everything_resident_leaves_nothing_to_swap():
    policy = make_policy("lru", 2, 3)
    table = filled_table(policy, [3, 3])
    policy.observe(np.ones((2, 3), int))
    assert policy.swaps(table.resident_mask, 3) == []


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_lru_against_a_plain_list(data: st.DataObject):
    # One wish per step and one swap per step: exactly the textbook's LRU.
    num_experts = data.draw(st.integers(2, 6))
    capacity = data.draw(st.integers(1, num_experts))
    policy = make_policy("lru", 1, num_experts)
    table = filled_table(policy, [capacity])
    oldest_first = list(range(capacity))
    for expert in data.draw(st.lists(st.integers(0, num_experts - 1), max_size=30)):
        policy.observe(np.bincount([expert], minlength=num_experts)[None])
        for swap in policy.swaps(table.resident_mask):
            apply(table, swap)
        if expert in oldest_first:
            oldest_first.remove(expert)
        else:
            del oldest_first[0]
        oldest_first.append(expert)
        assert sorted(oldest_first) == table.resident(0).tolist()


@pytest.mark.parametrize("name", ["emoe", "lfu", "random"])
def test_a_chunk_of_a_prompt_counts_like_its_tokens_one_by_one(name: str):
    wanted = np.array([[1.0, 1.0, 0, 0], [0, 0, 1.0, 1.0]], np.float32)
    token, later = np.array([[1, 0, 1, 0], [0, 1, 0, 1]]), np.array([[0, 0, 1, 1], [1, 1, 0, 0]])
    scores = []
    for at_once in (True, False):
        policy = make_policy(name, 2, 4)
        policy.plan(ExpectedWishes(wanted, wanted, 0.0))
        if at_once:
            policy.observe(np.zeros((2, 4), int), [ChunkWishes(7 * token, 7)])
        else:
            for _ in range(7):
                policy.observe(token)
        policy.scores()  # has it taken in; steps that are taken in together have no order
        policy.observe(later)
        scores.append(policy.scores())
    np.testing.assert_allclose(*scores, rtol=1e-5)


@pytest.mark.parametrize("requests", [2, 8])
def test_a_chunk_speaks_for_one_request_of_several(requests: int):
    """The others decode beside it, and what is known of them stays, however long the chunk is."""
    others = (requests - 1) * np.array([[1.0, 1.0, 0, 0]], np.float32)
    one = np.array([[0, 0, 1.0, 1.0]], np.float32)
    policy = make_policy("emoe", 1, 4)
    policy.plan(ExpectedWishes(others + one, others + one, 0.0))
    policy.observe(others.astype(int), [ChunkWishes(np.array([[0, 0, 100, 100]]), 100)])
    scores = policy.scores()[0]
    np.testing.assert_allclose(scores.sum(), 2 * requests, rtol=1e-3)
    assert scores[0] > 0.6 * (requests - 1) * scores.sum() / (2 * requests)


def test_a_step_loops_over_nothing():
    """However many layers and experts: numpy does it all, but for the calls that make a swap."""

    def calls(layers: int, experts: int) -> int:
        policy = make_policy("lru", layers, experts)
        table = filled_table(policy, [experts // 2] * layers)
        counts = np.zeros((layers, experts), int)
        counts[-1, -1] = 1
        policy.observe(counts)
        assert len(policy.swaps(table.resident_mask)) == 1
        return calls_made(lambda: (policy.observe(counts), policy.swaps(table.resident_mask)))

    assert calls(32, 64) == calls(4, 8)


def test_a_swap_must_gain_more_where_more_experts_are_resident(monkeypatch: pytest.MonkeyPatch):
    """Of the same scores, a layer with few slots swaps what a layer with many leaves alone."""
    rule = POLICIES["emoe"].rule(1, 8, PolicyWeights())
    first, last = rule.margin + rule.share_margin / 8, rule.margin + rule.share_margin * 7 / 8
    assert 0 < first < last
    scores = np.array([[1.0] * 7 + [1.0 + (first + last) / 2]], np.float32)
    swaps = []
    for capacity in (1, 7):
        policy = ResidencyPolicy(rule, 1, 8, np.array([[1.0] * 7 + [0.0]], np.float32))
        table = filled_table(policy, [capacity])
        monkeypatch.setattr(rule, "scores", lambda state: scores)
        swaps.append([swap.load for swap in policy.swaps(table.resident_mask)])
    assert swaps == [[7], []]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 6))
def test_swaps_are_the_best_exchange_again_and_again(seed: int, limit: int):
    rng = np.random.default_rng(seed)
    policy = make_policy("emoe", 3, 6, rng.random((3, 6)))
    table = filled_table(policy, [2, 3, 4])
    busy = rng.random((3, 6)) < 0.2
    rates = rng.random((3, 6)).round(1)
    policy.plan(ExpectedWishes(rates, 0 * rates, 1.0, rng.integers(0, 2, 3) * rng.random(3)))
    scores, sensitivity = policy.scores().copy(), policy.sensitivity
    expected = []
    for layer in np.flatnonzero(sensitivity).tolist():
        margin = policy.rule.margin + policy.rule.share_margin * table.capacities[layer] / 6
        absent = [e for e in range(6) if not busy[layer, e] and not table.is_resident(layer, e)]
        resident = [e for e in range(6) if not busy[layer, e] and table.is_resident(layer, e)]
        while absent and resident and len([swap for swap in expected if swap[0] == layer]) < limit:
            load = max(absent, key=lambda expert: scores[layer, expert])
            evict = min(resident, key=lambda expert: scores[layer, expert])
            if scores[layer, load] - scores[layer, evict] <= margin:
                break
            expected.append((layer, load, evict))
            absent.remove(load)
            resident.remove(evict)
    swaps = policy.swaps(table.resident_mask, limit, busy)
    assert sorted((swap.layer, swap.load, swap.evict) for swap in swaps) == sorted(expected)
    assert [swap.gain for swap in swaps] == sorted((swap.gain for swap in swaps), reverse=True)
