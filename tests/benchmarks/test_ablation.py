"""`python -m benchmarks.ablation`: parts that matter are worth something, parts that cannot matter say why."""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import ablation
from benchmarks.ablation import PARTS, Ablation, main
from benchmarks.residency.forecasts import learn_from
from benchmarks.residency.split import read_traces
from emoe_jax.predictor import Predictor, network
from tests.predictor.test_answers import PLAN, phases
from tests.predictor.test_tokens import told_by_tokens
from tests.traces.synthetic import make_trace
from train.predictor import answers


@pytest.fixture(autouse=True)
def short_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        answers, "AnswerHyperparameters", lambda: dataclasses.replace(PLAN, steps=40, evaluate_every=20)
    )


def rows_of(file: Path) -> dict[str, dict]:
    return {row["without"]: row for row in json.loads(file.read_text())["ablation"]}


def test_every_part_has_a_row_and_what_prompts_tell_is_worth_something(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Task and embedding decide all routing of this trace; nothing within an answer does."""
    make_trace(prompts=80).save(tmp_path / "trace.npz")
    assert main(["--trace", str(tmp_path / "trace.npz"), "--json", str(tmp_path / "out.json")]) == 0
    rows = rows_of(tmp_path / "out.json")
    assert list(rows) == ["nothing", *PARTS]
    for row in rows.values():
        assert list(row["coverage"]) == list(row["moved"]) == ["0.25", "0.5"]
    for part in ("prior", "embedding"):
        assert rows[part]["worth"]["0.25"] > 1
        assert "note" not in rows[part]
    for part in ("history", "earlier layers", "sensitivity", "drift", "gate"):
        assert rows[part]["note"]
        assert rows[part]["worth"] == {"0.25": 0, "0.5": 0}
    assert "without" in capsys.readouterr().out


def test_what_the_last_tokens_tell_is_worth_something_where_they_tell_all(tmp_path: Path):
    """Prompts of this trace are all alike; what an answer did last says what it does next."""
    phases(0).save(tmp_path / "trace.npz")
    argv = ["--trace", str(tmp_path / "trace.npz"), "--without", "prior", "last tokens", "refresh", "dynamics"]
    assert main([*argv, "--json", str(tmp_path / "out.json")]) == 0
    rows = rows_of(tmp_path / "out.json")
    assert list(rows) == ["nothing", "prior", "last tokens", "refresh", "dynamics"]
    assert rows["refresh"]["worth"]["0.25"] > 20
    assert rows["last tokens"]["worth"]["0.5"] > 1
    assert rows["dynamics"]["worth"]["0.25"] > 1
    assert rows["refresh"]["moved"]["0.25"] == 0


def test_networks_of_a_trained_predictor_are_left_out_with_their_history():
    trace = make_trace(prompts=40)
    learned = learn_from(trace.select(range(30)))
    predictor = learned.predictor
    weights = network.init(predictor.config, predictor.sizes, 0)
    head = np.random.default_rng(0).normal(0, 0.5, weights["head.kernel"].shape)
    strange = Predictor(
        predictor.config,
        predictor.trained,
        {**weights, "head.kernel": jnp.asarray(head, jnp.float32)},
        predictor.memory,
    )
    told: list[str] = []
    run = Ablation(
        trace.select(range(30)), trace.select(range(30, 40)), learned._replace(predictor=strange), 1, 1, told.append
    )
    whole, without_network, without_history = run.rows(["network", "history"])
    assert without_network["coverage"]["0.25"] > whole["coverage"]["0.25"]  # an untrained network does harm
    assert "note" not in without_history
    assert without_history["coverage"] != whole["coverage"]
    assert told == ["without network", "without history"]


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    make_trace(prompts=12).save(tmp_path / "trace.npz")
    make_trace(prompts=6, experts=6).save(tmp_path / "other.npz")
    trace = str(tmp_path / "trace.npz")
    cases = [
        (["--trace", str(tmp_path / "none.npz")], "no such trace file"),
        (["--trace", trace, "--train-trace", str(tmp_path / "other.npz")], "3 MoE layers of 6 experts, top-2"),
        (["--trace", trace, "--predictor", str(tmp_path)], "holds no predictor"),
    ]
    for argv, message in cases:
        assert main(argv) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    for argv, message in ((["--predict-every", "0"], "'0' is not a whole number"), (["--without", "luck"], "'luck'")):
        with pytest.raises(SystemExit):
            ablation.arguments(["--trace", trace, *argv])
        assert message in capsys.readouterr().err


def test_what_tokens_tell_is_learned_where_a_trace_holds_them(tmp_path: Path):
    told_by_tokens(60, 0).save(tmp_path / "trace.npz")
    argv = ["--trace", str(tmp_path / "trace.npz"), "--without", "tokens", "--json", str(tmp_path / "out.json")]
    assert main(argv) == 0
    rows = rows_of(tmp_path / "out.json")
    assert "note" not in rows["tokens"]
    assert rows["tokens"]["coverage"] != rows["nothing"]["coverage"]


def test_a_predictor_that_has_seen_the_replayed_prompts_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    trace = make_trace(prompts=40)
    trace.save(tmp_path / "trace.npz")
    known = learn_from(trace.select(range(35))).predictor
    monkeypatch.setattr(Predictor, "load", lambda _: known)
    read = read_traces(tmp_path / "trace.npz", None, tmp_path / "predictor")
    assert (read.seen, read.replayed.num_prompts) == (5, 10)
    assert read_traces(tmp_path / "trace.npz", None, None).warning is None
    argv = ["--trace", str(tmp_path / "trace.npz"), "--predictor", str(tmp_path / "predictor"), "--without", "drift"]
    assert main(argv) == 0
    assert "warning: 5 of the 10 replayed prompts" in capsys.readouterr().out
