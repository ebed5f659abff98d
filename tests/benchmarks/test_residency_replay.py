"""Replay against plain loops that do the same one expert at a time."""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.residency.forecasts import learn_from, plan_of, predicted
from benchmarks.residency.replay import Totals, replay
from benchmarks.residency.stream import Plans, Stream, make_plans, make_stream
from emoe_jax.policies.caching import Fixed, Lru
from emoe_jax.policies.dynamics import Dynamics
from emoe_jax.policies.refresh import Refresh
from emoe_jax.traces import RoutingTrace
from tests.traces.synthetic import make_trace

TRACE = make_trace(prompts=5, tokens=30)
M, E, TOP_K = TRACE.num_layers, TRACE.num_experts, TRACE.top_k


def forecasts(trace: RoutingTrace, seed: int = 0) -> np.ndarray:
    shape = (trace.num_prompts, trace.num_layers)
    return np.random.default_rng(seed).dirichlet(np.ones(trace.num_experts), shape).astype(np.float32)


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=8), concurrency=st.integers(1, 4))
def test_a_stream_has_every_token_once_and_plans_add_up(lengths: list[int], concurrency: int):
    whole = make_trace(prompts=len(lengths), tokens=20)
    kept = whole.rank() < np.array(lengths)[whole.sample]
    trace = RoutingTrace(
        whole.experts[kept],
        whole.probs[kept],
        whole.sample[kept],
        whole.token_pos[kept],
        whole.task,
        whole.task_names,
        E,
    )
    stream = make_stream(trace, concurrency)
    assert stream.num_tokens == sum(lengths)
    for prompt, length in enumerate(lengths):
        steps, places = np.nonzero(stream.prompt == prompt)
        assert len(set(places)) == 1
        assert steps.tolist() == list(range(steps[0], steps[0] + length))
        np.testing.assert_array_equal(stream.experts[steps, places], trace.experts[trace.sample == prompt])
    assert (stream.experts[stream.prompt < 0] == E).all()
    firsts = [np.nonzero(stream.prompt == prompt)[0][0] for prompt in range(len(lengths))]
    assert firsts == sorted(firsts)
    told = forecasts(trace)
    plans = make_plans(stream, told, TOP_K)
    for step, running in enumerate(stream.prompt):
        expected = np.zeros((M, E))
        for prompt in running[running >= 0]:
            expected += TOP_K * told[prompt]
        np.testing.assert_allclose(plans.rates[stream.plan[step]], expected, atol=1e-5)
    assert ((plans.kept >= 0) & (plans.kept <= 1)).all()
    np.testing.assert_allclose(plans.joined.sum(), TOP_K * M * len(lengths), rtol=1e-4)


def follow(
    stream: Stream, plans: Plans, capacity: int, update: Callable[[set[int], list[set[int]], int, int], int]
) -> dict[str, int]:
    """What replay counts, token by token. `update(resident, wishes, step, layer)` is what happens after a step."""
    first = np.argsort(-plans.rates[0], axis=1, kind="stable")
    resident = [set(first[layer, :capacity].tolist()) for layer in range(M)]
    hits = moved = misses = free = 0
    for step, chosen in enumerate(stream.experts[:, 0]):
        found = [[int(e) in resident[layer] for e in chosen[layer]] for layer in range(M)]
        hits += sum(map(sum, found))
        free += all(map(all, found))
        misses += sum(not hit for row in found for hit in row)
        if step + 1 < len(stream.experts):
            for layer in range(M):
                wished = [set(map(int, later)) for later in stream.experts[:, 0, layer]]
                moved += update(resident[layer], wished, step, layer)
    return {"hits": hits, "moved": moved, "misses": misses, "free_tokens": free}


def assert_same(totals: Totals, expected: dict[str, int], g: int = 0) -> None:
    assert {name: int(getattr(totals, name)[g]) for name in expected} == expected


@pytest.mark.parametrize("capacity", [2, 4, 7])
def test_lru_against_a_plain_loop(capacity: int):
    stream = make_stream(TRACE, 1)
    plans = make_plans(stream, forecasts(TRACE), TOP_K)
    used = {(layer, e): -1 for layer in range(M) for e in range(E)}

    def update(resident: set[int], wished: list[set[int]], step: int, layer: int) -> int:
        for expert in wished[step]:
            used[layer, expert] = step
        absent = wished[step] - resident
        for expert in absent:
            resident.remove(min(resident - wished[step], key=lambda old: (used[layer, old], old)))
            resident.add(expert)
        return len(absent)

    totals = replay(stream, E, [[capacity] * M, [E] * M], Lru(), plans, E)
    assert_same(totals, follow(stream, plans, capacity, update))
    assert totals.hits[1] == stream.num_tokens * M * TOP_K
    assert totals.moved[1] == totals.missed_weight[1] == totals.misses[1] == 0
    assert (
        0 < totals.missed_weight[0] == pytest.approx(totals.misses[0] / TOP_K, rel=1e-3)
    )  # the trace's weights are 1/k


@pytest.mark.parametrize("capacity", [2, 4])
def test_oracle_against_a_plain_loop_and_above_lru(capacity: int):
    """It loads what was just wished for, and anything when a plan begins. Here the first step begins none."""
    stream = make_stream(TRACE, 1)
    stream.is_new[0] = False
    plans = make_plans(make_stream(TRACE, 1), forecasts(TRACE), TOP_K)

    def update(resident: set[int], wished: list[set[int]], step: int, layer: int) -> int:
        def next_use(expert: int) -> int:
            return next((s for s in range(step + 1, len(wished)) if expert in wished[s]), 10**6)

        moved = 0
        loadable = set(range(E)) if stream.is_new[step + 1] else wished[step]
        absent = sorted(loadable - resident, key=lambda e: (next_use(e), e))
        for expert in absent:
            latest = max(resident, key=lambda e: (next_use(e), -e))
            if next_use(expert) < next_use(latest):
                resident.remove(latest)
                resident.add(expert)
                moved += 1
        return moved

    belady = replay(stream, E, [[capacity] * M], None, plans, E)
    expected = follow(stream, plans, capacity, update)
    assert int(belady.hits[0]) == expected["hits"]  # equally late experts may be told apart, which changes no hit
    assert belady.hits[0] > replay(stream, E, [[capacity] * M], Lru(), plans, E).hits[0]


def test_a_fixed_set_moves_only_when_a_plan_begins():
    stream = make_stream(TRACE, 1)
    told = forecasts(TRACE)
    plans = make_plans(stream, told, TOP_K)
    totals = replay(stream, E, [[3] * M], Fixed(), plans, 0)
    sets = [np.argsort(-rates, axis=1, kind="stable")[:, :3] for rates in plans.rates]
    moved = sum(
        len(set(after[m].tolist()) - set(before[m].tolist())) for before, after in pairwise(sets) for m in range(M)
    )
    hits = sum(
        np.isin(stream.experts[step, 0, m], sets[stream.plan[step]][m]).sum()
        for step in range(len(stream.plan))
        for m in range(M)
    )
    assert (int(totals.moved[0]), int(totals.hits[0])) == (moved, hits)


def test_p_counts_prompts_and_the_papers_policy_has_its_own():
    """`p` prompts in a row plan with the forecast of the first of them; the paper's p is 40, whatever else is asked."""
    trace = make_trace(prompts=90, tokens=4)
    learned = learn_from(trace)
    every = {p: predicted(learned.predictor, trace, p) for p in (1, 40)}
    assert len(np.unique(every[1], axis=0)) == 90
    assert len(np.unique(every[40], axis=0)) == 3
    np.testing.assert_array_equal(every[40], every[1][np.arange(90) // 40 * 40])
    for policy in ("emoe", "emoe-no-refresh"):
        np.testing.assert_array_equal(plan_of(policy, learned, trace, 1), every[1])
    for p in (1, 7):
        np.testing.assert_array_equal(plan_of("emoe-paper", learned, trace, p), every[40])


def test_margins_of_a_rule_that_swaps_less_where_more_is_resident():
    """Scores that change places by a little every step: only the layer share that allows it exchanges experts."""
    stream = make_stream(TRACE, 1)
    plans = make_plans(stream, forecasts(TRACE), TOP_K)

    def rule_with(extra: float) -> Refresh:
        rule = Refresh(Dynamics.untrained(M, E))
        rule.share_margin = extra
        return rule

    moved = []
    for extra in (0.0, 0.3):
        moved.append(replay(stream, E, [[2] * M, [6] * M], rule_with(extra), plans, 1).moved)
    assert (moved[1] < moved[0]).all()


def test_what_the_last_layer_knows_early_is_learned():
    """Every ten tokens a prompt turns to other experts, the last layer three tokens before the others."""
    rng = np.random.default_rng(0)
    tokens, prompts = 300, 6
    of_mode = rng.random((6, M, E)).argsort(-1)[..., :TOP_K]
    mode = np.repeat(rng.integers(0, 6, prompts * tokens // 10), 10)
    experts = of_mode[mode]
    experts[:, -1] = of_mode[np.roll(mode, -3), -1]
    trace = RoutingTrace(
        experts.astype(np.uint8),
        np.full(experts.shape, 0.5, np.float16),
        np.repeat(np.arange(prompts, dtype=np.int32), tokens),
        np.tile(np.arange(tokens, dtype=np.int32), prompts),
        np.zeros(prompts, np.int16),
        ("any",),
        E,
        rng.normal(size=(prompts, 4)).astype(np.float16),
    )
    learned = learn_from(trace.select(range(4)), None)
    replayed = trace.select([4, 5])
    stream = make_stream(replayed, 1)
    plans = make_plans(stream, predicted(learned.predictor, replayed, 1), TOP_K)
    assert learned.knowledge.dynamics is not None
    rules = Refresh(learned.knowledge.dynamics), Refresh(Dynamics.untrained(M, E))
    knows, counts = (replay(stream, E, [[3] * M], rule, plans, TOP_K).hits[0] / (600 * M * TOP_K) for rule in rules)
    assert knows > counts + 0.05
