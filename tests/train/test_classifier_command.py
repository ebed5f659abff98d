"""`python -m train.classifier`: accuracy on drawn or given prompts, abstention, time; and its errors."""

import json
from pathlib import Path

import pytest

from emoe_jax.tasks import TaskProfile
from train import classifier

PROFILE = TaskProfile(2, 8, 2, threshold=1.0).with_task("poem", keywords={"a poem": 2.0})


def test_given_prompts_are_counted_by_what_they_were_taken_for(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    PROFILE.with_task("maths", keywords={"solve": 2.0, "gold": 2.0}).save(tmp_path / "p.json")
    lines = [
        {"task": "poem", "prompt": "Write a poem on rain."},
        {
            "task": "poem",
            "messages": [{"role": "user", "content": "solve it"}, {"role": "user", "content": "by rhyme"}],
        },
        {"task": "poem", "prompt": "Rhyme on rain."},
        {"task": "maths", "prompt": "Solve x = 2 + 2", "answer": "ignored"},
    ]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    argv = ["--profile", str(tmp_path / "p.json"), "--prompts", str(tmp_path / "prompts.jsonl")]
    assert classifier.main([*argv, "--json", str(tmp_path / "n.json")]) == 0
    numbers = json.loads((tmp_path / "n.json").read_text())
    assert numbers["accuracy"] == 0.5
    assert numbers["tasks"]["poem"] == {
        "prompts": 3,
        "accuracy": 1 / 3,
        "found": {"poem": 1, "maths": 1, "other": 1},
    }
    assert numbers["tasks"]["maths"]["accuracy"] == 1
    assert numbers["unrelated"]["taken"] == {"Gold has the atomic number 79.": "maths"}
    assert 0 < numbers["milliseconds"]["least"] <= numbers["milliseconds"]["median"]
    assert "50.0%" in capsys.readouterr().out


def test_learned_keywords_are_written_and_tell_drawn_prompts(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    TaskProfile(2, 8, 2).with_task("qa", sensitivity=(0.0, 1.0)).save(path)
    argv = ["--profile", str(path), "--learn", "60", "--per-task", "30", "--json", str(tmp_path / "n.json")]
    assert classifier.main(argv) == 0
    numbers = json.loads((tmp_path / "n.json").read_text())
    assert set(numbers["tasks"]) == {"sum", "clsfy", "qa", "comp", "conv"}
    assert numbers["accuracy"] > 0.8
    assert numbers["unrelated"]["abstained"] > 0.8
    profile = TaskProfile.load(path)
    assert profile.tasks["qa"].sensitivity == (0.0, 1.0)
    assert all(task.keywords for task in profile.tasks.values())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", ":1 is not JSON"),
        ("[]", ":1 is no JSON object"),
        ('{"prompt": "x"}', "task is 'None'"),
        ('{"task": "other", "prompt": "x"}', "'other' stands for no task"),
        ('{"task": "a"}', "needs either prompt or messages"),
        ('{"task": "a", "prompt": "x", "messages": []}', "needs either prompt or messages"),
        ('{"task": "a", "prompt": 3}', "prompt must be text"),
        ('{"task": "a", "messages": ["x"]}', "prompt must be text"),
        ('{"task": "a", "messages": []}', "prompt must be text"),
        ('{"task": "a", "prompt": " "}', "the prompt is empty"),
        ("", "holds no prompts"),
    ],
)
def test_a_bad_line_of_prompts_is_named(tmp_path: Path, capsys: pytest.CaptureFixture, line: str, message: str) -> None:
    PROFILE.save(tmp_path / "p.json")
    (tmp_path / "bad.jsonl").write_text(line + "\n")
    argv = ["--profile", str(tmp_path / "p.json"), "--prompts", str(tmp_path / "bad.jsonl")]
    assert classifier.main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "bad.jsonl" in error
    assert message in error
    assert error.count("\n") == 1


def test_a_profile_without_keywords_and_missing_files(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert classifier.main(["--profile", str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err
    TaskProfile(2, 8, 2).save(tmp_path / "empty.json")
    assert classifier.main(["--profile", str(tmp_path / "empty.json")]) == 2
    assert "holds no keywords; learn them with --learn" in capsys.readouterr().err
    PROFILE.save(tmp_path / "p.json")
    assert classifier.main(["--profile", str(tmp_path / "p.json"), "--prompts", str(tmp_path / "no.jsonl")]) == 2
    assert "no.jsonl: No such file" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        classifier.main(["--per-task", "0"])
    assert caught.value.code == 2
