"""`python -m train.demo` refuses bad arguments in one line, with status 2."""

import pytest

from train.demo import __main__ as demo
from train.demo.trainer import Hyperparameters
from train.tasks import texts


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps is 0"),
        (["--steps", "many"], "invalid int value: 'many'"),
        (["--rows", "6"], "--rows is 6; it must be a multiple of 4"),
        (["--length", "2000"], "--length is 2000; it must be between 64 and 256"),
        (["--eval-examples", "4", "--eval-generated", "5"], "--eval-generated is 5"),
        (["--eval-only", "--out", "/nowhere"], "/nowhere holds no checkpoint"),
        (["--expert-dropout", "1.5"], "--expert-dropout is 1.5; it must be between 0 and 1"),
        (["--concentration", "-1"], "--concentration is -1.0; it must be between 0 and 10"),
        (["--epochs", "3"], "unrecognized arguments: --epochs"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        demo.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_run_of_another_plan_is_not_overwritten(tmp_path, capsys):
    (tmp_path / "plan.json").write_text('{"steps": 5}')
    with pytest.raises(SystemExit) as stopped:
        demo.main(["--work", str(tmp_path), "--out", str(tmp_path / "out"), "--steps", "7"])
    assert stopped.value.code == 2
    assert "holds a run of another plan or on other texts" in capsys.readouterr().err


def test_a_run_on_other_texts_is_not_resumed(tmp_path, capsys, monkeypatch):
    """Another version of Python has another standard library: what a run has seen so far would not fit the rest."""
    plan = Hyperparameters(7)
    demo._claim(tmp_path, plan)
    demo._claim(tmp_path, plan)
    monkeypatch.setattr(texts, "fingerprint", lambda: "01234567")
    with pytest.raises(SystemExit):
        demo._claim(tmp_path, plan)
    assert "holds a run of another plan or on other texts" in capsys.readouterr().err


def test_expert_dropout_and_concentration_are_off_by_default():
    plan = Hyperparameters(7)
    assert (plan.expert_dropout, plan.concentration) == (0.0, 0.0)
    assert demo.arguments([]).expert_dropout == 0.0
