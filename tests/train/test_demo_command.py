"""`python -m train.demo` refuses bad arguments in one line, with status 2."""

import pytest

from train.demo import __main__ as demo


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps is 0"),
        (["--steps", "many"], "invalid int value: 'many'"),
        (["--rows", "6"], "--rows is 6; it must be a multiple of 4"),
        (["--length", "2000"], "--length is 2000; it must be between 64 and 256"),
        (["--eval-examples", "4", "--eval-generated", "5"], "--eval-generated is 5"),
        (["--eval-only", "--out", "/nowhere"], "/nowhere holds no checkpoint"),
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
    assert "holds a run of another plan" in capsys.readouterr().err
