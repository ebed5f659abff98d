"""What rivals would have covered: the same as in replay, within bounds, and never more lookups than Belady's rule."""

import contextlib
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.residency.replay import replay
from benchmarks.residency.stream import Stream, make_plans, make_stream
from emoe_jax.policies import POLICIES, PolicyWeights
from emoe_jax.policies import regret as regret_module
from emoe_jax.policies.belady import NEVER, next_use
from emoe_jax.policies.instant_exchange import exchange
from emoe_jax.policies.regret import BELADY, ENGINE, MOST_BYTES, RIVALS, Regret, Window
from tests.traces.synthetic import make_trace

TRACE = make_trace(prompts=6, tokens=30)
M, E, TOP_K = TRACE.num_layers, TRACE.num_experts, TRACE.top_k


@pytest.fixture(autouse=True)
def always_due(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regret_module, "REGRET_SHARE", 1e9)


def shares_by_task(names: tuple[str, ...], layers: int = M, experts: int = E) -> dict[str | None, np.ndarray]:
    rng = np.random.default_rng(5)
    return {name: rng.dirichlet(np.ones(experts), layers).astype(np.float32) for name in names}


def counts_of(stream: Stream) -> np.ndarray:
    return (stream.experts[..., None] == np.arange(E)).sum((1, 3))


def tasks_at(stream: Stream, step: int) -> tuple[str, ...]:
    return tuple(TRACE.tasks[prompt] for prompt in stream.prompt[step] if prompt >= 0)


def tally(regret: Regret, name: str) -> tuple[int, int]:
    of = regret.state()["policies"][name]
    return of["wishes"], of["lookups"]


@pytest.mark.parametrize("window", [7, 20])
@pytest.mark.parametrize("concurrency", [1, 3])
@pytest.mark.parametrize("capacities", [(2,) * M, (1, 3, 5, 7)[:M] + (2,) * (M - 4)])
def test_counters_are_those_of_replay(capacities: tuple[int, ...], concurrency: int, window: int) -> None:
    stream = make_stream(TRACE, concurrency)
    whole = len(stream.plan) // window * window
    stream = Stream(*(field[:whole] for field in stream))
    shares = shares_by_task(TRACE.task_names)
    plans = make_plans(stream, np.stack([shares[task] for task in TRACE.tasks]), TOP_K)
    counts = counts_of(stream)
    regret = Regret(capacities, E, TOP_K, lambda task: shares[task], plans.rates[0], steps=window)
    resident = np.random.default_rng(1).random(counts.shape) < 0.5
    for step in range(whole):
        regret.record(counts[step], counts[step] * resident[step], tasks_at(stream, step), loads=3 * step)
    state = regret.state()
    assert (state["steps"], state["steps_left_out"]) == (whole, 0)
    assert (state["wishes"], state["lookups"]) == (counts.sum(), np.count_nonzero(counts))
    assert tally(regret, ENGINE) == ((counts * resident).sum(), np.count_nonzero(counts * resident))
    assert state["policies"][ENGINE]["loads"] == 3 * (whole - 1)
    for name in RIVALS:
        totals = replay(stream, E, [capacities], POLICIES[name].rule(M, E, PolicyWeights()), plans, E)
        expected = {
            "wishes": int(totals.hits[0]),
            "lookups": int(state["lookups"] - totals.misses[0]),
            "loads": int(totals.moved[0]),
        }
        assert {key: state["policies"][name][key] for key in expected} == expected, name
    hits = lookups = 0
    for first in range(0, whole, window):
        steps = range(first, first + window)
        is_new = [
            step == first or Counter(tasks_at(stream, step)) != Counter(tasks_at(stream, step - 1)) for step in steps
        ]
        part = Stream(*(field[first : first + window] for field in stream))
        part = part._replace(is_new=np.array(is_new), plan=np.zeros(window, np.int64))
        totals = replay(part, E, [capacities], None, plans, E)
        hits += int(totals.hits[0])
        lookups += np.count_nonzero(counts[first : first + window]) - int(totals.misses[0])
    assert tally(regret, BELADY)[1] == lookups
    # Which of equally late experts stays is left to chance, and one that stays may be wished for by more tokens.
    if concurrency == 1:
        assert tally(regret, BELADY)[0] == hits


@st.composite
def traffic(draw: st.DrawFn) -> tuple[np.ndarray, list[tuple[str, ...]], tuple[int, ...]]:
    layers, experts, steps = draw(st.integers(1, 3)), draw(st.integers(2, 6)), draw(st.integers(1, 20))
    seed, tokens = draw(st.integers(0, 2**32 - 1)), draw(st.integers(1, 4))
    rng = np.random.default_rng(seed)
    counts = np.zeros((steps, layers, experts), np.int64)
    for _ in range(tokens):
        chosen = rng.integers(0, experts, (steps, layers))
        counts += chosen[..., None] == np.arange(experts)
    tasks = [tuple(draw(st.lists(st.sampled_from("ab"), min_size=1, max_size=2))) for _ in range(steps)]
    capacities = tuple(draw(st.lists(st.integers(1, experts), min_size=layers, max_size=layers)))
    return counts, tasks, capacities


@settings(max_examples=150, deadline=None)
@given(traffic())
def test_no_rival_has_more_lookups_than_belady(made: tuple[np.ndarray, list[tuple[str, ...]], tuple[int, ...]]) -> None:
    """Over several windows, whose rivals begin with what the one before has left them."""
    counts, tasks, capacities = made
    _, layers, experts = counts.shape
    shares = shares_by_task(("a", "b"), layers, experts)
    window = max(1, len(counts) // 2)
    regret = Regret(capacities, experts, 1, lambda task: shares[task], steps=window)
    for step, counted in enumerate(counts):
        regret.record(counted, counted, tasks[step], 0)
    most_wishes, most = tally(regret, BELADY)
    for name in RIVALS:
        wishes, lookups = tally(regret, name)
        assert lookups <= most, name
        if (counts <= 1).all():
            assert wishes <= most_wishes, name


def most_lookups(wished: np.ndarray, is_new: np.ndarray, capacity: int) -> int:
    """Of one layer: by trying every set of residents in every step."""
    best = {frozenset(some): 0 for some in combinations(range(wished.shape[1]), capacity)}
    for step, wanted in enumerate(wished):
        after: dict[frozenset[int], int] = {}
        for new in best:
            may_load = set(np.flatnonzero(wished[step - 1]).tolist())
            before = [found for old, found in best.items() if not step or is_new[step] or new - old <= may_load]
            after[new] = max(before) + int(sum(wanted[expert] for expert in new))
        best = after
    return max(best.values())


@settings(max_examples=60, deadline=None)
@given(traffic())
def test_belady_has_as_many_lookups_as_there_can_be(
    made: tuple[np.ndarray, list[tuple[str, ...]], tuple[int, ...]],
) -> None:
    counts, tasks, capacities = made
    steps, layers, experts = counts.shape
    shares = shares_by_task(("a", "b"), layers, experts)
    regret = Regret(capacities, experts, 1, lambda task: shares[task], steps=steps)
    for step, counted in enumerate(counts):
        regret.record(counted, counted, tasks[step], 0)
    is_new = np.array([step > 0 and Counter(tasks[step]) != Counter(tasks[step - 1]) for step in range(steps)])
    best = sum(most_lookups(counts[:, m] > 0, is_new, capacities[m]) for m in range(layers))
    assert regret.state()["steps"] == steps
    assert tally(regret, BELADY)[1] == best


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 7), st.sampled_from([0.0, 1.0, 2.5]))
def test_an_exchange_is_the_best_single_ones_one_after_the_other(seed: int, experts: int, margin: float) -> None:
    rng = np.random.default_rng(seed)
    shape = (2, 3, experts)
    scores = rng.integers(-4, 5, shape).astype(np.float32)  # many ties
    loadable = rng.random(shape) < 0.7
    ranks = rng.random(shape).argsort(-1).argsort(-1)
    resident = ranks < rng.integers(1, experts + 1, (2, 3, 1))
    expected, moved = resident.copy(), [0, 0]
    for p, m in np.ndindex(2, 3):
        here, score = expected[p, m], scores[p, m]
        while True:
            absent = np.where(loadable[p, m] & ~here, score, -np.inf)
            present = np.where(here, score, np.inf)
            if not absent.max() - present.min() > margin:
                break
            here[absent.argmax()], here[present.argmin()] = True, False
            moved[p] += 1
    assert exchange(resident, scores, loadable, np.full((2, 3), margin)).tolist() == moved
    np.testing.assert_array_equal(resident, expected)


def test_the_next_use_counts_steps_and_ends_with_the_window() -> None:
    wished = np.array([[0, 1], [1, 0], [1, 0], [0, 0]], bool)[:, None]
    assert next_use(wished)[:, 0].tolist() == [[1, 0], [0, NEVER], [0, NEVER], [NEVER, NEVER]]
    np.testing.assert_array_equal(next_use(wished[:2], next_use(wished[2:])[0]), next_use(wished)[:2])
    long = np.zeros((NEVER + 5, 1, 1), bool)
    long[-1] = True
    assert next_use(long)[[0, 3, 4, 5, -1], 0, 0].tolist() == [NEVER, NEVER, NEVER, NEVER - 1, 0]


def test_memory_is_bounded_and_steps_without_time_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regret_module, "REGRET_SHARE", 1e-12)  # due once, for a cost that is not known yet
    regret = Regret((2, 2), 8, 2, steps=10)
    arrays = regret.recorded.counts, regret.judged.counts
    counts = np.full((2, 8), 70_000)  # more than a cell of a window can hold
    for _ in range(500):
        regret.record(counts, counts, ["a"], 0)
    assert {id(regret.recorded.counts), id(regret.judged.counts)} == set(map(id, arrays))
    assert len(regret.recorded) == 10
    assert (regret.recorded.tasks, len(regret.judged)) == ([("a",)] * 10, 10)
    state = regret.state()
    assert (state["steps"], state["steps_left_out"]) == (0, 480)
    assert all(of["coverage"] is None and of["hit_rate"] is None for of in state["policies"].values())


def test_a_window_of_many_experts_is_shorter() -> None:
    small, large = Regret((4,) * 8, 32, 4), Regret((64,) * 60, 512, 8)
    assert small.state()["window_steps"] == 256
    assert 16 <= large.state()["window_steps"] < 256
    assert large.recorded.counts.nbytes <= MOST_BYTES


def test_without_known_tasks_there_is_no_static_task() -> None:
    assert set(Regret((2,), 4, 1).state()["policies"]) == {ENGINE, "lru", "lfu", BELADY}
    shares = shares_by_task(("a",), 1, 4)
    assert set(Regret((2,), 4, 1, lambda task: shares[task]).state()["policies"]) == {ENGINE, *RIVALS, BELADY}


def test_a_step_without_wishes_is_no_step() -> None:
    regret = Regret((2,), 4, 1, steps=3)
    regret.record(np.zeros((1, 4), int), np.zeros((1, 4), int), ["a"], 0)
    assert len(regret.recorded) == 0


def test_rivals_have_as_many_slots_as_the_engine() -> None:
    """A change drops what was not judged; the best experts stay."""
    regret = Regret((3, 3), 8, 2, steps=4)
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 2, (30, 2, 8))
    for counted in counts:
        regret.record(counted, counted, ["a"], 0)
    judged = regret.state()["steps"]
    scores = regret.scores()
    regret.use_capacities((1, 5))
    assert (regret.resident.sum(-1) == [1, 5]).all()
    kept = np.where(regret.resident[:-1], scores, np.inf).min(-1)
    assert (kept >= np.where(regret.resident[:-1], -np.inf, scores).max(-1)).all()
    assert (len(regret.recorded), len(regret.judged)) == (0, 0)
    assert judged == 28
    for counted in counts[:7]:
        regret.record(counted, counted, ["a"], 0)
    assert regret.state()["steps"] == judged + 4
    assert (regret.resident.sum(-1) == [1, 5]).all()


class Turns:
    """A pace that allows so many pieces of the work."""

    def __init__(self, turns: int):
        self.turns = turns

    @property
    def due(self) -> bool:
        self.turns -= 1
        return self.turns >= 0

    def timed(self) -> contextlib.nullcontext:
        return contextlib.nullcontext()


def test_half_a_judged_window_counts_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    regret = Regret((3, 3), 8, 2, steps=6)
    monkeypatch.setattr(regret, "_pace", Turns(4))
    counts = np.random.default_rng(0).integers(0, 3, (12, 2, 8))
    for counted in counts[:6]:
        regret.record(counted, counted, ["a"], 0)
    assert regret.state()["steps"] == 0
    regret.use_capacities((8, 8))
    monkeypatch.setattr(regret, "_pace", Turns(1000))
    for counted in counts[6:]:
        regret.record(counted, counted, ["a"], 0)
    for name in ("lru", "lfu", BELADY):
        assert tally(regret, name) == (counts[6:].sum(), np.count_nonzero(counts[6:]))
        assert regret.state()["policies"][name]["loads"] == 0


def test_a_cleared_window_forgets_its_sums() -> None:
    window = Window(2, 1, 3)
    window.add(np.array([[1, 0, 2]]), np.array([[1, 0, 0]]), ("a",), 4)
    assert (window.wanted.wishes, window.wanted.lookups) == (3, 2)
    assert (window.covered.wishes, window.covered.lookups, window.covered.loads) == (1, 1, 4)
    window.clear()
    assert (len(window), window.wanted.wishes, window.covered.loads) == (0, 0, 0)
