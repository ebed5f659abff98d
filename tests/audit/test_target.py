"""The search for a tolerance: it keeps the target, is not too careful, and follows traffic that changes."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emoe_jax.audit.findings import LEAST, Estimate, Finding, Findings, interval_of
from emoe_jax.audit.mix import Wishes
from emoe_jax.audit.target import FORGOTTEN_AFTER, QualityTarget, ToleranceSearch, ladder
from emoe_jax.errors import ConfigError
from emoe_jax.requests.contract import QualityTargets
from tests.audit.test_mix import wishes_of

RUNGS = ladder(top_k=4)
TARGET = 0.01
USUAL = wishes_of(0)


def serve(
    search: ToleranceSearch, kl: Callable[[float], float], requests: int, rng: np.random.Generator
) -> list[float]:
    """The tolerances of requests of which each is audited; `kl` is the mean at a tolerance, answers scatter by half."""
    tolerances = []
    for _ in range(requests):
        search.arrived()
        tolerances.append(search.tolerance)
        audited(search, kl(search.tolerance) * rng.gamma(4, 0.25), int(rng.integers(8, 64)))
    return tolerances


def audited(search: ToleranceSearch, lost: float, tokens: int = 32, wishes: Wishes = USUAL) -> None:
    """An answer ends, and its audit finds so much lost."""
    tolerance = search.tolerance
    search.ended(tolerance, wishes, tokens, 0.02)
    search.found(Finding(tokens, lost, 0.9, tolerance, given_up=0.02), wishes)


def search() -> ToleranceSearch:
    return ToleranceSearch(TARGET, RUNGS, RUNGS.index(0.15))


@settings(max_examples=25, deadline=None)
@given(st.floats(0.02, 0.7), st.floats(1.0, 4.0), st.integers(0, 2**32))
def test_it_finds_the_largest_tolerance_that_keeps_the_target(limit: float, power: float, seed: int) -> None:
    """`limit` is the tolerance at which the target is just kept."""
    path = search()
    serve(path, lambda tolerance: math.log1p(TARGET) * (tolerance / limit) ** power, 200, np.random.default_rng(seed))
    kept = [rung for rung in RUNGS if rung <= limit]
    assert -3 <= RUNGS.index(path.tolerance) - RUNGS.index(kept[-1]) <= 1


def test_it_falls_back_to_exact_and_tries_again_later() -> None:
    path, rng = search(), np.random.default_rng(0)
    serve(path, lambda tolerance: 0.0 if tolerance == 0 else 1.0, 60, rng)
    assert (path.tolerance, path.settled) == (0.0, True)
    serve(path, lambda tolerance: 1e-4, FORGOTTEN_AFTER + 200, rng)
    assert path.tolerance > 0.15


def test_it_comes_down_when_traffic_changes() -> None:
    path, rng = search(), np.random.default_rng(0)
    serve(path, lambda tolerance: 0.01 * tolerance, 200, rng)
    high = path.tolerance
    tolerances = serve(path, lambda tolerance: 0.3 * tolerance, 200, rng)
    assert high > 0.5
    assert path.tolerance <= 0.04
    assert tolerances.index(min(tolerances)) < 120


def test_a_tolerance_that_lost_too_much_is_left_alone_for_a_while() -> None:
    path, rng = search(), np.random.default_rng(0)
    tolerances = serve(path, lambda tolerance: 0.0 if tolerance < 0.2 else 0.02, FORGOTTEN_AFTER // 2, rng)
    tried = [before < 0.2 <= now for before, now in itertools.pairwise(tolerances)]
    assert sum(tried) == 1
    assert (path.tolerance, path.settled) == (0.178, True)


def test_it_comes_down_without_an_audit_when_a_known_kind_that_loses_more_grows() -> None:
    path, (easy, hard) = search(), (wishes_of(0), wishes_of(1))
    for _ in range(12):
        audited(path, 0.0065, wishes=easy)
    audited(path, 0.018, wishes=hard)
    audited(path, 0.018, wishes=hard)
    settled = path.tolerance
    assert path.settled
    for _ in range(32):
        path.arrived()
        path.ended(settled, hard, 32, 0.02)
    assert path.tolerance < settled


def test_it_comes_down_without_an_audit_when_answers_give_up_more() -> None:
    path, wishes = search(), wishes_of(0)
    for _ in range(12):
        audited(path, 0.007, wishes=wishes)
    settled = path.tolerance
    for _ in range(32):
        path.ended(settled, wishes, 32, 0.02)
    assert (path.tolerance, path.settled) == (settled, True)
    for _ in range(32):
        path.ended(settled, wishes, 32, 0.04)
    assert path.tolerance < settled


def test_answers_of_a_kind_that_no_audit_knows_are_audited() -> None:
    path = search()
    for _ in range(12):
        audited(path, 0.008, wishes=wishes_of(0))
    assert path.settled
    for _ in range(4):
        path.ended(path.tolerance, wishes_of(1), 32, 0.02)
    assert path.settled
    for _ in range(12):
        path.ended(path.tolerance, wishes_of(1), 32, 0.02)
    assert not path.settled
    audited(path, 0.008, wishes=wishes_of(1))
    assert path.settled


def test_answers_under_another_tolerance_do_not_count() -> None:
    path = search()
    for _ in range(40):
        path.ended(0.3, wishes_of(0), 20, 0.5)
        path.found(Finding(20, 5.0, 0.1, tolerance=0.3, given_up=0.5), wishes_of(0))
    assert path.tolerance == 0.15


def test_tasks_have_their_own_search_and_the_number_of_tasks_is_bounded() -> None:
    target = QualityTarget(QualityTargets.parse("1%,SUM=3%"), top_k=4)
    assert target.search("SUM") is target.search("SUM") is not target.search("COMP")
    searches = {id(target.search(f"task {index}")) for index in range(1000)}
    assert len(searches) <= 64
    assert target.state()["tasks"]["SUM"] == {"tolerance": 0.15, "settled": False}


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.integers(1, 500)), min_size=2, max_size=20))
def test_an_estimate_is_the_mean_over_tokens_within_its_interval(answers: list[tuple[float, int]]) -> None:
    values, tokens = [value for value, _ in answers], [count for _, count in answers]
    estimate = Estimate.of(values, tokens)
    assert estimate.mean == pytest.approx(np.average(values, weights=tokens))
    for lossless, worst in ((0.0, 1.0), (1.0, 0.0)):
        interval = estimate.interval(lossless, worst)
        if interval is None:
            assert len(answers) < LEAST
        else:
            assert 0 <= interval[1] <= estimate.mean + 1e-12
            assert estimate.mean <= interval[2] + 1e-12 <= 1 + 2e-12


@pytest.mark.parametrize(("shape", "answers", "least"), [(4.0, 24, 0.92), (0.5, 12, 0.87)])
def test_intervals_hold_the_truth_about_as_often_as_they_say(shape: float, answers: int, least: float) -> None:
    """Also of losses that are mostly small and sometimes large: an interval of equal arms holds it in 86 %."""
    rng, held = np.random.default_rng(0), 0
    for _ in range(1000):
        tokens = rng.integers(8, 64, size=answers).tolist()
        estimate = Estimate.of(rng.gamma(shape, 1 / shape, size=answers).tolist(), tokens)
        _, low, high = estimate.interval(0.0, 99.0) or (0, 0, 0)
        held += low <= 1.0 <= high
    assert least < held / 1000 <= 0.98


def test_losses_that_no_audit_met_are_allowed_for() -> None:
    """Of a task that loses little, one answer in twenty loses most; other tasks lose 0.05."""
    rng, held = np.random.default_rng(1), 0
    tokens = [10] * 12
    for _ in range(500):
        losses = np.where(rng.random(12) < 0.05, 0.03, rng.gamma(2.0, 2.5e-4, size=12)).tolist()
        interval = interval_of(losses, tokens, 0.0, 99.0, common=0.05)
        assert interval is not None
        held += interval[1] <= 0.05 * 0.03 + 0.95 * 5e-4 <= interval[2]
    assert held / 500 > 0.93


def test_a_task_alone_that_lost_nothing_may_yet_lose_something() -> None:
    findings = Findings()
    for _ in range(LEAST):
        findings.add("resident", "qa", Finding(tokens=10, kl=0.0, agreement=1.0))
    found = findings.state()["resident"]["qa"]
    for measure, lossless, end in (("kl", 0.0, 2), ("top1_agreement", 1.0, 1), ("perplexity_ratio", 1.0, 2)):
        assert found[measure][0] == lossless
        assert abs(found[measure][end] - lossless) > 0.001


def test_what_is_common_widens_no_more_than_the_end_of_more_loss() -> None:
    alike, tokens = [0.99] * 4 + [0.98] * 4, [10] * 8
    mean, low, high = interval_of(alike, tokens, 1.0, 0.0, common=0.8) or (0, 0, 0)
    own = Estimate.of(alike, tokens).interval(1.0, 0.0)
    assert own is not None
    assert (mean, high) == (own[0], own[2])
    assert low < own[1]
    assert interval_of(alike, tokens, 1.0, 0.0, common=1.0) == own
    assert interval_of(alike[:7], tokens[:7], 1.0, 0.0, common=0.8) is None


def test_an_interval_reaches_by_a_factor_to_both_sides_of_the_loss() -> None:
    losses = Estimate(0.02, 0.004, 10)
    _, low, high = losses.interval(0.0, 1.0) or (0, 0, 0)
    assert low * high == pytest.approx(0.02**2)
    assert math.log(high / 0.02) == pytest.approx(2.262 * 0.2, rel=1e-3)  # Student's t of nine
    _, less, more = losses._replace(mean=0.98).interval(1.0, 0.0) or (0, 0, 0)
    assert (1 - less, 1 - more) == (pytest.approx(high), pytest.approx(low))
    assert Estimate(0.0, 0.0, 10).interval(0.0, 1.0) == (0, 0, 0)


@pytest.mark.parametrize("text", ["1", "0%", "-1%", "nan%", "inf%", "", "%", "SUM=1%", "1%,2%", "1%,=2%", "1%,SUM=x"])
def test_what_is_no_target_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="quality_target is"):
        QualityTargets.parse(text)
