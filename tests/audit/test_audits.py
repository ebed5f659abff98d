"""Audits of an engine: what they find, and that they leave everything else alone."""

from typing import Any

import numpy as np
import pytest
from scipy.special import log_softmax, rel_entr

from emoe_jax import Engine, SamplingParams
from emoe_jax.audit import auditor
from emoe_jax.audit.auditor import MOST_QUEUED
from emoe_jax.requests.served import MOST_KEPT
from tests.engines import EngineFactory

GREEDY = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
DRAWN = SamplingParams(max_tokens=24, temperature=1.0, seed=5, ignore_eos=True)
RNG = np.random.default_rng(3)
PROMPTS = [RNG.integers(0, 60, size=length).tolist() for length in (3, 17, 40, 9)]


@pytest.fixture
def audited(engine_of: EngineFactory) -> Engine:
    """Half of the experts are resident, and every answer is audited."""
    engine = engine_of(expert_memory="4 slots", audit_rate=1.0, policy="lru")
    finish_audits(engine)
    return engine


def finish_audits(engine: Engine) -> None:
    while engine.has_work():
        engine.step()


def found(engine: Engine, contract: str) -> dict[str, Any]:
    return engine.state()["audit"]["contracts"][contract]["unclassified"]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_an_audit_finds_what_two_uncached_forwards_differ_by(engine_of: EngineFactory, prompt: list[int]) -> None:
    engine = engine_of(expert_memory="4 slots", audit_rate=1.0, seed=len(prompt))
    output = engine.generate(prompt, GREEDY)[0]
    assert output.substituted > 0
    # No expert has been loaded so far, so this is what the answer was drawn from.
    text = [*prompt, *output.token_ids[:-1]]
    served = engine.logits(text, "resident")[len(prompt) - 1 :]
    finish_audits(engine)
    exact = engine.logits(text, "exact")[len(prompt) - 1 :]
    ours, theirs = log_softmax(exact, axis=-1), log_softmax(served, axis=-1)
    kl = rel_entr(np.exp(ours), np.exp(theirs)).sum(axis=-1).mean()
    findings = found(engine, "resident")
    assert findings["audits"] == 1
    assert findings["tokens"] == 20
    assert findings["kl"][0] == pytest.approx(kl, rel=1e-3, abs=1e-6)
    assert findings["perplexity_ratio"][0] == pytest.approx(np.exp(kl), rel=1e-3)
    same = exact.argmax(axis=-1) == served.argmax(axis=-1)
    assert findings["top1_agreement"][0] == pytest.approx(same.mean(), abs=1e-6)


def test_long_answers_are_audited_on_a_sample_of_their_tokens(audited: Engine) -> None:
    long = SamplingParams(max_tokens=80, temperature=1.0, seed=1, ignore_eos=True)
    audited.add_request("long", PROMPTS[0], long)
    sequence = audited.parts.scheduler.waiting[0]
    while not audited.output("long").finished:
        audited.step()
    audited.pop("long")
    served = sequence.served
    assert served is not None
    assert len(served.positions) == MOST_KEPT
    assert served.positions.max() > 3 + 40
    finish_audits(audited)
    assert sorted(served.kl) == served.positions.tolist()


def test_an_answer_that_lost_nothing_is_not_computed_again(engine_of: EngineFactory) -> None:
    engine = engine_of(expert_memory="7 slots", audit_rate=1.0, policy="lru", host_memory="0")
    engine.generate(PROMPTS[0], GREEDY, routing="exact")
    before = engine.state()["audit"]
    forwards = engine.loop.dispatcher.forwards.copy()
    assert engine.generate(PROMPTS[0], GREEDY)[0].substituted == 0  # its experts are there
    finish_audits(engine)
    after = engine.state()["audit"]
    assert after["audits"] == before["audits"] + 1
    assert engine.loop.dispatcher.forwards == forwards  # which count `exact` only
    assert found(engine, "resident")["kl"][0] == 0


def test_answers_that_lost_nothing_are_given_up_like_others(
    engine_of: EngineFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(expert_memory="7 slots", audit_rate=1.0, policy="lru", host_memory="0")
    engine.generate(PROMPTS[0], GREEDY, routing="exact")
    finish_audits(engine)
    before = engine.state()["audit"]
    with monkeypatch.context() as patch:
        patch.setattr(engine.auditor, "due", lambda idle: False)
        for _ in range(MOST_QUEUED + 3):
            assert engine.generate(PROMPTS[0], GREEDY)[0].substituted == 0
    finish_audits(engine)
    after = engine.state()["audit"]
    assert after["audits"] - before["audits"] == MOST_QUEUED
    assert after["given_up"] - before["given_up"] == 3


def test_answers_under_exact_are_not_audited(audited: Engine) -> None:
    before = audited.state()["audit"]["audits"]
    audited.generate(PROMPTS, GREEDY, routing="exact")
    audited.generate(PROMPTS, GREEDY, tolerance=0.0)
    finish_audits(audited)
    assert audited.state()["audit"]["audits"] == before


def test_audits_between_the_steps_of_others_change_nothing_for_them(audited: Engine, engine_of: EngineFactory) -> None:
    full = engine_of(expert_memory="100%")
    before = audited.state()["audit"]["audits"]
    for round_ in range(4):
        for index, prompt in enumerate(PROMPTS):
            audited.add_request(f"{round_}-{index}", prompt, DRAWN, routing="exact" if index % 2 else "resident")
    while not all(audited.output(f"3-{index}").finished for index in range(4)):
        audited.step()
    for round_ in range(4):
        for index in (1, 3):
            output = audited.pop(f"{round_}-{index}")
            assert output.token_ids == full.generate(PROMPTS[index], DRAWN)[0].token_ids
        for index in (0, 2):
            audited.pop(f"{round_}-{index}")
    finish_audits(audited)
    assert audited.state()["audit"]["audits"] > before
    assert audited.parts.scheduler.pool.num_used == 0


def test_an_audit_that_fails_ends_no_request(audited: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = audited.generate(PROMPTS[1], DRAWN, routing="exact")[0].token_ids
    audited.generate(PROMPTS[2], GREEDY)
    before = audited.state()["audit"]
    assert before["waiting"] > 0
    collect = audited.parts.dispatcher.collect

    def fail(dispatched: Any) -> Any:
        if dispatched.plan.sequences[0].compared_with is not None:
            raise RuntimeError("the device is gone")
        return collect(dispatched)

    monkeypatch.setattr(audited.parts.dispatcher, "collect", fail)
    assert audited.generate(PROMPTS[1], DRAWN, routing="exact")[0].token_ids == wanted
    finish_audits(audited)
    after = audited.state()["audit"]
    assert after["given_up"] > before["given_up"]
    assert after["waiting"] == 0
    assert audited.parts.scheduler.pool.num_used == 0


def test_audits_make_no_room_where_there_is_none(audited: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    audited.generate(PROMPTS[2], GREEDY)
    before = audited.state()["audit"]
    monkeypatch.setattr(audited.parts.scheduler.pool, "can_allocate", lambda count: False)
    finish_audits(audited)
    after = audited.state()["audit"]
    assert after["given_up"] == before["given_up"] + before["waiting"]


def test_few_answers_keep_their_logits_at_once(audited: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each keeps rows over the vocabulary, in host memory and on their way there."""
    monkeypatch.setattr(auditor, "MOST_AUDITED", 2)

    def kept(requests: range) -> list[bool]:
        for number in requests:
            audited.add_request(f"r{number}", PROMPTS[0], GREEDY)
        sequences = [*audited.parts.scheduler.running, *audited.parts.scheduler.waiting]
        return [sequence.served is not None for sequence in sequences]

    assert kept(range(4)) == [True, True, False, False]
    audited.abort("r0")
    assert kept(range(4, 5)) == [True, False, False, True]
    finish_audits(audited)


def test_a_target_finds_a_tolerance_and_names_it(engine_of: EngineFactory) -> None:
    engine = engine_of(expert_memory="4 slots", routing="auto", audit_rate=0.01, quality_target="0.01%,loose=90%")
    tolerances: dict[str, list[float]] = {"loose": [], "strict": []}
    for count in range(120):
        prompt = RNG.integers(0, 60, size=6).tolist()
        for task, seen in tolerances.items():
            output = engine.generate(prompt, GREEDY, task=task)[0]
            assert output.routing == "bounded"
            assert output.tolerance is not None
            seen.append(output.tolerance)
        if count % 4 == 0:
            finish_audits(engine)
    assert tolerances["loose"][0] == tolerances["strict"][0] == 0.3
    assert tolerances["loose"][-1] > 0.3 > tolerances["strict"][-1]
    state = engine.state()["audit"]["target"]
    assert state["tasks"]["loose"]["tolerance"] >= tolerances["loose"][-1] / 1.3
    assert state["of_tasks"] == {"loose": 0.9}
