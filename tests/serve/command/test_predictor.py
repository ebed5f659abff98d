"""`emoe predictor`: from recorded traffic to a predictor that the server finds by itself."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from emoe_jax.models import config_from_directory
from emoe_jax.residency.knowledge import PREDICTOR_FOLDER, RoutingKnowledge
from serve import emoe
from serve.command.predictor.train import DRAFT
from tests.traces.synthetic import make_trace
from train.predictor import __main__ as trainer
from train.predictor import report


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("own") / "model"
    shutil.copytree(tiny_checkpoint, directory)
    return directory


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("traces") / "trace.npz"
    make_trace(prompts=8, dim=32, tokens=6).save(path)
    return path


def test_the_engine_finds_what_one_command_has_trained(
    model: Path, trace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place, command = model / PREDICTOR_FOLDER, ["predictor", "train", str(model), "--traces", str(trace)]
    assert emoe.main([*command, "--steps", "1", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["predictor"] == str(place)
    assert "finds it at its next start" in err
    assert not (model / DRAFT).exists()
    assert not (place / "checkpoints").exists()
    known = RoutingKnowledge.load(model, config_from_directory(model), "auto", "auto")
    assert known.predictor_path == place
    assert known.dynamics is not None

    def train_again(given: Any, console: Any) -> dict[str, Any]:
        shutil.copytree(place, given.out)
        (given.out / "of the second").touch()
        return {}

    monkeypatch.setattr(trainer, "train", train_again)
    monkeypatch.setattr(report, "print_evaluation", lambda *arguments: None)
    assert emoe.main(command) == 0
    assert "replaced" in capsys.readouterr().out
    assert (place / "of the second").exists()


@pytest.mark.parametrize("updates", [True, False])
def test_a_predictor_is_judged_where_the_server_finds_it(
    model: Path, trace: Path, updates: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    judged = []
    monkeypatch.setattr(trainer, "judge", lambda given: judged.append(given) or {"prompts": 16})
    words = ["--json"] if updates else ["--json", "--no-updates"]
    assert emoe.main(["predictor", "evaluate", str(model), "--traces", str(trace), *words]) == 0
    assert json.loads(capsys.readouterr().out) == {"prompts": 16}
    [given] = judged
    assert (given.traces, given.evaluate, given.no_updates) == (trace, model / PREDICTOR_FOLDER, not updates)


def test_an_unfinished_run_of_other_options_is_named(
    model: Path, trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (model / DRAFT).mkdir()
    (model / DRAFT / "run.json").write_text("{}")
    assert emoe.main(["predictor", "train", str(model), "--traces", str(trace)]) == 2
    err = capsys.readouterr().err
    assert err == (
        f"error: {model / DRAFT} holds an unfinished run on another trace or with other options; remove it to begin "
        "anew\n"
    )
    shutil.rmtree(model / DRAFT)


@pytest.mark.parametrize("command", ["train", "evaluate"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{model}"], "--traces is missing; expected a routing trace of this model"),
        (["nowhere", "--traces", "{trace}"], "nowhere is no directory; expected that of the checkpoint"),
        (["{model}", "--traces", "missing.npz"], "missing.npz: no such trace file"),
        (["{model}", "--traces", "{other}"], "is of 3 MoE layers of 16 experts, top-2; the model in"),
        (["{model}", "--traces", "{single}"], "holds 1 prompt(s); record more traffic"),
    ],
)
def test_a_mistake_is_one_line(
    model: Path,
    trace: Path,
    tmp_path: Path,
    command: str,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other, single = tmp_path / "other.npz", tmp_path / "single.npz"
    make_trace(prompts=2, experts=16).save(other)
    make_trace(prompts=1).save(single)
    words = [word.format(model=model, trace=trace, other=other, single=single) for word in arguments]
    try:
        status = emoe.main(["predictor", command, *words])
    except SystemExit as ended:
        status = ended.code
    out, err = capsys.readouterr()
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert message in err
