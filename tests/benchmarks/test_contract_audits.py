"""`benchmarks.contracts --audit-check` and `--audit-cost`: what audits find, against all tokens, and what they take."""

import json
import math
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks.contracts import audits
from benchmarks.contracts.__main__ import main
from benchmarks.contracts.audits import EveryToken, Scored, compared, cost_of
from benchmarks.quality import served
from emoe_jax import Engine
from emoe_jax.audit.auditor import Auditor
from emoe_jax.audit.findings import Finding, Findings
from emoe_jax.requests.served import MOST_KEPT, ServedLogits
from tests.benchmarks.quality_samples import write_model

RNG = np.random.default_rng(7)


@pytest.fixture(autouse=True)
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audits, "DRAWS", 300)


def scored(mean: float, audited: bool, tokens: int = 20) -> Scored:
    return Scored("qa", RNG.gamma(2.0, mean / 2, tokens), RNG.random(tokens) < 0.9, audited)


def found_of(answers: list[Scored], times: float = 1.0) -> dict:
    """What an engine's state would say of the audited ones, with losses so many times too large."""
    findings = Findings()
    for each in answers:
        if each.audited:
            findings.add("bounded", "qa", Finding(len(each.kl), times * each.kl.mean(), float(each.agrees.mean()), 0.2))
    return findings.state()["bounded"]


def test_audits_of_a_sample_agree_with_all_answers_and_wrong_ones_do_not() -> None:
    answers = [scored(RNG.uniform(0.01, 0.03), index % 4 == 0) for index in range(80)]
    kl, agreement, ratio = compared(answers, found_of(answers), seed=0)
    truth = np.concatenate([each.kl for each in answers]).mean()
    assert (kl["answers"], kl["audited"], kl["of_all"]) == (80, 20, pytest.approx(truth))
    assert ratio["of_all"] == pytest.approx(math.exp(truth))
    assert kl["within"]
    assert agreement["within"]
    assert ratio["within"]
    assert all(0.9 < row["covers"] < 0.99 for row in (kl, agreement, ratio))
    wrong = next(compared(answers, found_of(answers, times=2), seed=0))
    assert not wrong["within"]


def test_few_audits_have_no_interval() -> None:
    answers = [scored(0.02, index < 3) for index in range(9)]
    assert [(row["within"], row["covers"]) for row in compared(answers, found_of(answers), 0)] == [(None, None)] * 3


def test_every_token_is_kept_beside_the_sample_that_is_audited() -> None:
    every, usual = EveryToken(5), ServedLogits(5)
    for token in range(3 * MOST_KEPT):
        logits = np.full(4, token, np.float32)
        every.keep(token, 10 + token, logits)
        if usual.slot(token) is not None:
            usual.keep(token, 10 + token, logits)
    assert len(every.rows) == 3 * MOST_KEPT
    assert every.positions.tolist() == usual.positions.tolist()
    assert every.logits(every.positions[:1]).tolist() == [[every.positions[0] - 10.0] * 4]


def test_the_cost_is_what_a_turn_loses() -> None:
    found = cost_of([0.98, 0.97, 1.0, 0.98, 0.5, 0.99])
    assert found == {
        "cost": pytest.approx(0.02),
        "low": pytest.approx(0.01, abs=0.01),
        "high": pytest.approx(0.2, abs=0.15),
    }
    assert cost_of([0.9]) == {"cost": pytest.approx(0.1), "low": None, "high": None}


def test_the_commands_serve_score_again_and_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every answer is audited, so audits say what all tokens say; and audits that are slow are seen to be slow."""
    monkeypatch.setattr(Engine, "warm_up", lambda _: None)
    monkeypatch.setattr(served, "ANSWER_TOKENS", 6)
    monkeypatch.setattr(Auditor, "due", lambda self, idle: self.has_work)
    step = Auditor.step

    def slowly(self: Auditor) -> None:
        time.sleep(0.15)
        step(self)

    monkeypatch.setattr(Auditor, "step", slowly)
    options = ["--model", str(write_model(tmp_path / "tiny")), "--json", str(tmp_path / "numbers.json"), "--no-live"]
    sizes = ["--tasks", "facts", "--prompts", "8", "--batches", "2", "--turns", "1", "--tolerances", "0.45"]
    assert main([*options, *sizes, "--audit-check", "--audit-cost", "--audit-rate", "1"]) == 0
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    checked, cost = numbers["audit_check"], numbers["audit_cost"]
    assert (checked["answers"], checked["audits"], checked["given_up"]) == (8, 8, 0)
    kl, agreement, _ = checked["rows"]
    assert kl["of_all"] > 0
    assert kl["estimate"] == pytest.approx(kl["of_all"], rel=1e-3, abs=1e-5)
    assert agreement["estimate"] == pytest.approx(agreement["of_all"], abs=1e-5)
    assert cost["audits"] + cost["given_up"] == 8  # those of the turn without audits, and of the turn before, are not
    assert cost["cost"] > 0.2
    assert cost["audit_share"] > 0.2
    assert cost["tokens_per_s"] < 0.8 * cost["tokens_per_s_without"]


@pytest.mark.parametrize("option", ["--audit-check", "--audit-cost"])
def test_audits_need_a_rate(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--no-live", option, "--audit-rate", "0"])
    assert "need an --audit-rate above 0" in capsys.readouterr().err
