"""Kinds of answers are told apart by their wishes, and audits of each kind stand for all its answers."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emoe_jax.audit.findings import Estimate, Finding
from emoe_jax.audit.mix import ALIKE, RECENT, TrafficMix, Wishes

LAYERS, EXPERTS, TOP_K = 3, 16, 2


def wishes_of(kind: int, tokens: int = 64, seed: int = 0) -> Wishes:
    """Those of a text: each kind has favourites of its own in every layer."""
    favour = np.random.default_rng(1000 + kind).gamma(0.3, size=(LAYERS, EXPERTS)) + 1e-3
    rng = np.random.default_rng(seed)
    counts = np.zeros((LAYERS, EXPERTS), np.int64)
    for layer, weights in enumerate(favour):
        for _ in range(tokens):
            counts[layer, rng.choice(EXPERTS, TOP_K, replace=False, p=weights / weights.sum())] += 1
    return Wishes.of(counts)


def finding(kl: float, tokens: int = 32, given_up: float = 0.02) -> Finding:
    return Finding(tokens, kl, 0.9, 0.15, given_up)


@pytest.mark.parametrize("tokens", [8, 32, 256])
def test_texts_of_one_kind_overlap_whatever_their_length(tokens: int) -> None:
    for kind in range(4):
        texts = [wishes_of(kind, tokens, seed) for seed in range(6)]
        assert all(one.overlap(other) > ALIKE for one in texts for other in texts)
        assert all(one.overlap(wishes_of(kind + 1, tokens)) < 0.75 for one in texts)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 5), st.integers(0, 5), st.integers(0, 99))
def test_overlap_is_symmetric_and_within_0_and_1(m: int, n: int, one: int, other: int, seed: int) -> None:
    a, b = wishes_of(one, m, seed), wishes_of(other, n, seed + 1)
    assert a.overlap(b) == pytest.approx(b.overlap(a), abs=1e-6)
    assert 0 <= a.overlap(b) <= 1


def test_texts_without_a_common_expert_do_not_overlap() -> None:
    counts = np.zeros((2, 4), np.int64)
    counts[:, 0] = 1
    assert Wishes.of(counts).overlap(Wishes.of(counts)) == 1
    assert Wishes.of(counts).overlap(Wishes.of(np.roll(counts, 1, axis=1))) == 0


def test_each_kind_counts_by_the_answers_there_were_of_it() -> None:
    mix = TrafficMix()
    for kind, kl in ((0, 0.002), (1, 0.02)):
        for seed in range(4):
            mix.ended(wishes_of(kind, seed=seed), 32, 0.02)
            mix.found(finding(kl), wishes_of(kind, seed=seed))
    estimate = mix.estimate()
    assert estimate is not None
    assert (estimate.mean, estimate.answers) == (pytest.approx(0.011), 8)
    for seed in range(RECENT):
        mix.ended(wishes_of(0 if seed % 4 else 1, seed=100 + seed), 32, 0.02)
    estimate = mix.estimate()
    assert estimate is not None
    assert estimate.mean == pytest.approx(0.75 * 0.002 + 0.25 * 0.02)
    assert mix.unknown == 0


def test_of_audited_kinds_that_are_much_alike_the_most_similar_one_counts() -> None:
    one, other = (Wishes.of(np.array([counts] * 2)) for counts in ([600, 400, 0], [600, 200, 200]))
    assert ALIKE < one.overlap(other) < 0.95
    mix = TrafficMix()
    for wishes, kl in ((one, 0.002), (other, 0.02)):
        mix.ended(wishes, 32, 0.02)
        mix.found(finding(kl), wishes)
    for _ in range(RECENT):
        mix.ended(one, 32, 0.02)
    estimate = mix.estimate()
    assert estimate is not None
    assert (estimate.mean, mix.unknown) == (pytest.approx(0.002), 0)


def test_answers_that_gave_up_more_are_expected_to_have_lost_more() -> None:
    mix = TrafficMix()
    mix.ended(wishes_of(0), 32, 0.02)
    mix.found(finding(0.01), wishes_of(0))
    for seed in range(RECENT):
        mix.ended(wishes_of(0, seed=seed), 10, 0.05)
    estimate = mix.estimate()
    assert estimate is not None
    assert (estimate.mean, estimate.error) == (pytest.approx(0.025), math.inf)


def test_answers_of_no_audited_kind_are_told_and_do_not_count() -> None:
    mix = TrafficMix()
    assert (mix.unknown, mix.estimate()) == (1, None)
    mix.ended(wishes_of(0), 30, 0.02)
    assert (mix.unknown, mix.estimate()) == (1, None)
    mix.found(finding(0.01), wishes_of(0))
    mix.ended(wishes_of(1), 10, 0.5)
    estimate = mix.estimate()
    assert estimate is not None
    assert (mix.unknown, estimate.mean) == (pytest.approx(0.25), pytest.approx(0.01))
    mix.clear()
    assert (mix.unknown, mix.estimate()) == (1, None)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.integers(1, 500)), min_size=2, max_size=20))
def test_with_one_kind_and_an_audit_of_each_answer_it_is_the_plain_mean(answers: list[tuple[float, int]]) -> None:
    mix, wishes = TrafficMix(), wishes_of(0)
    for kl, tokens in answers:
        mix.ended(wishes, tokens, 0.02)
        mix.found(finding(kl, tokens), wishes)
    estimate, plain = mix.estimate(), Estimate.of([kl for kl, _ in answers], [tokens for _, tokens in answers])
    assert estimate is not None
    assert estimate.mean == pytest.approx(plain.mean, abs=1e-9)
    # The jackknife leaves out one answer at a time: exact for equal lengths.
    if len({tokens for _, tokens in answers}) == 1:
        assert estimate.error == pytest.approx(plain.error, abs=1e-9)
