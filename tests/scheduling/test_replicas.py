"""Which replica gets a request: bounds on the load hold for any replicas, and preferences within them."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emoe_jax.errors import ConfigError
from emoe_jax.scheduling.replicas import (
    CLOSE,
    ROUTINGS,
    Asked,
    Candidate,
    NoReplica,
    PrefixAffine,
    TaskAffine,
    make_routing,
)

TASKS = ("qa", "conv", "sum")
published = st.one_of(st.none(), st.dictionaries(st.sampled_from(list[str](TASKS)), st.floats(0, 1)))


@st.composite
def replicas(draw: st.DrawFn) -> list[Candidate]:
    count = draw(st.integers(1, 12))
    return [
        Candidate(f"replica {index}", draw(st.integers(0, 40)), draw(published), draw(st.booleans()))
        for index in range(count)
    ]


asked = st.builds(Asked, st.one_of(st.none(), st.sampled_from(TASKS)), st.binary(max_size=4))


@given(replicas(), asked, st.integers(0, 20), st.sampled_from(ROUTINGS), st.integers(0, 99))
def test_the_choice_is_alive_and_within_the_threshold(
    candidates: list[Candidate], request: Asked, threshold: int, name: str, seed: int
):
    routing, rng = make_routing(name, threshold), random.Random(seed)
    alive = [candidate for candidate in candidates if candidate.alive]
    if not alive:
        with pytest.raises(NoReplica, match=f"none of {len(candidates)} replicas"):
            routing.choose(candidates, request, rng)
        return
    chosen = routing.choose(candidates, request, rng)
    assert chosen in alive
    if name != "random":
        allowed = 0 if name == "least-loaded" else threshold
        assert chosen.load <= min(candidate.load for candidate in alive) + allowed
    assert chosen == make_routing(name, threshold).choose(candidates, request, random.Random(seed))


@given(replicas(), st.sampled_from(TASKS), st.integers(0, 20))
def test_no_allowed_replica_serves_the_task_better(candidates: list[Candidate], task: str, threshold: int):
    candidates = [candidate._replace(alive=True) for candidate in candidates]
    chosen = TaskAffine(threshold).choose(candidates, Asked(task), random.Random(0))
    least = min(candidate.load for candidate in candidates)
    shares = [
        candidate.serves[task]
        for candidate in candidates
        if candidate.load <= least + threshold and candidate.serves is not None and task in candidate.serves
    ]
    if shares:
        assert chosen.serves is not None
        assert chosen.serves[task] >= max(shares) - CLOSE
    else:
        assert chosen.load == least


@given(replicas(), st.one_of(st.none(), st.just("poetry")))
def test_without_a_published_task_the_least_loaded_gets_it(candidates: list[Candidate], task: str | None):
    candidates = [candidate._replace(alive=True) for candidate in candidates]
    chosen = TaskAffine(9).choose(candidates, Asked(task), random.Random(0))
    assert chosen.load == min(candidate.load for candidate in candidates)


def test_load_decides_between_replicas_that_serve_a_task_alike():
    candidates = [
        Candidate("a", 3, {"qa": 0.800}),
        Candidate("b", 2, {"qa": 0.795}),
        Candidate("c", 0, {"qa": 0.5}),
        Candidate("d", 9, {"qa": 0.99}),
    ]
    assert TaskAffine(4).choose(candidates, Asked("qa"), random.Random(0)).name == "b"
    assert TaskAffine(9).choose(candidates, Asked("qa"), random.Random(0)).name == "d"
    assert TaskAffine(1).choose(candidates, Asked("qa"), random.Random(0)).name == "c"


@given(st.sets(st.binary(min_size=1, max_size=6), min_size=1, max_size=30), st.integers(2, 8))
def test_a_prefix_keeps_its_replica_while_that_lives(prefixes: set[bytes], count: int):
    routing, rng = PrefixAffine(0), random.Random(0)
    candidates = [Candidate(f"replica {index}", 0) for index in range(count)]
    home = {prefix: routing.choose(candidates, Asked(prefix=prefix), rng).name for prefix in prefixes}
    dead = next(iter(home.values()))
    for left in (
        [candidate._replace(alive=candidate.name != dead) for candidate in candidates],
        [candidate for candidate in candidates if candidate.name != dead],
    ):
        for prefix, name in home.items():
            now = routing.choose(left, Asked(prefix=prefix), rng).name
            assert now == name if name != dead else now != dead


def test_prefixes_are_spread_over_all_replicas():
    routing, rng = PrefixAffine(), random.Random(0)
    candidates = [Candidate(f"replica {index}", 0) for index in range(8)]
    homes = Counter(routing.choose(candidates, Asked(prefix=b"%d" % n), rng).name for n in range(4000))
    assert len(homes) == 8
    assert all(300 < count < 700 for count in homes.values())


def test_random_and_ties_reach_every_replica():
    rng = random.Random(0)
    candidates = [Candidate(name, 1, {"qa": 0.5}) for name in "abcd"]
    for name in ("random", "least-loaded", "task-affine"):
        routing = make_routing(name)
        homes = Counter(routing.choose(candidates, Asked("qa"), rng).name for _ in range(2000))
        assert min(homes.values()) > 400


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_routing("nearest"), "there is no routing 'nearest'; expected one of random, least-loaded"),
        (lambda: make_routing("task-affine", -1), "the balance threshold is -1; it must be at least 0"),
        (lambda: make_routing("prefix-affine", -1), "the balance threshold is -1; it must be at least 0"),
        (lambda: TaskAffine(1, -0.1), "close is -0.1; it must be at least 0"),
    ],
)
def test_mistakes_are_named(make, message: str):
    with pytest.raises(ConfigError, match=message):
        make()
