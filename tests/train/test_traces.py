"""`python -m train.traces` from end to end on a tiny model."""

import json
from pathlib import Path

import numpy as np
import pytest

from emoe_jax import Engine, SamplingParams
from emoe_jax.tasks import TaskClassifier, TaskProfile
from emoe_jax.traces import RoutingTrace
from emoe_jax.traces.parts import parts_of
from tests.serve import checkpoint as tiny
from train import traces
from train.prompts import TEXT_TOKENS
from train.tasks import examples


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("traces") / "tiny"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny.CONFIG, "max_position_embeddings", 640)
        tiny.write_tiny_checkpoint(directory)
    return directory


def test_a_run_makes_trace_profile_and_numbers(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    trace_path, profile_path, json_path = (tmp_path / name for name in ("t.npz", "profile.json", "numbers.json"))
    TaskProfile(1, 8, 2).with_task("clsfy", sensitivity=(0.5,)).save(profile_path)
    command = ["--model", str(model), "--tasks", "clsfy", "comp", "--per-task", "6", "--max-tokens", "5"]
    command += ["--max-num-seqs", "4", "--keyword-prompts", "40", "--out", str(trace_path)]
    assert traces.main([*command, "--profile", str(profile_path), "--json", str(json_path)]) == 0
    assert "clsfy" in capsys.readouterr().out
    trace = RoutingTrace.load(trace_path)
    assert sorted(trace.tasks) == ["clsfy"] * 6 + ["comp"] * 6
    assert trace.tasks != sorted(trace.tasks)  # arrivals are mixed
    numbers = json.loads(json_path.read_text())
    assert numbers["tokens"] == trace.num_tokens == sum(row["tokens"] for row in numbers["tasks"].values())
    profile = TaskProfile.load(profile_path)
    clsfy = profile.tasks["clsfy"]
    assert clsfy.sensitivity == (0.5,)  # of an earlier command
    assert clsfy.output_length is not None
    assert clsfy.output_length.count == clsfy.prompts == 6
    assert clsfy.output_length.mean <= 5
    assert clsfy.routing is not None
    np.testing.assert_allclose(clsfy.routing.sum(axis=1), 1, atol=1e-5)
    assert "the sentiment of" in clsfy.keywords

    question = "What is the sentiment of this tweet?\nI love it"
    with Engine.load(model, expert_memory="100%", task_profile=profile_path, max_num_seqs=1) as engine:
        params = SamplingParams(max_tokens=1)
        assert engine.tokenizer is not None
        outputs = engine.generate([question, engine.tokenizer.encode(question), "Lorem ipsum"], params)
        assert [output.task for output in outputs] == ["clsfy", "clsfy", "other"]
        assert engine.generate(question, params, task="qa")[0].task == "qa"


def test_facts_are_questions_of_the_task_qa(model: Path, tmp_path: Path) -> None:
    trace_path, profile_path = tmp_path / "t.npz", tmp_path / "profile.json"
    command = ["--model", str(model), "--tasks", "clsfy", "qa", "facts", "--per-task", "3", "--max-tokens", "1"]
    assert (
        traces.main([*command, "--keyword-prompts", "60", "--out", str(trace_path), "--profile", str(profile_path)])
        == 0
    )
    assert sorted(RoutingTrace.load(trace_path).tasks) == ["clsfy"] * 3 + ["qa"] * 6
    profile = TaskProfile.load(profile_path)
    assert set(profile.tasks) == {"clsfy", "qa"}
    classifier = TaskClassifier(profile)
    asked = [example.prompt for example in examples("facts", "test", 1, 40)]
    assert np.mean([classifier.classify(question) == "qa" for question in asked]) > 0.8


def test_texts_are_read_token_by_token(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    command = ["--model", str(model), "--tasks", "clsfy", "code", "--per-task", "3", "--max-tokens", "4"]
    assert traces.main([*command, "--max-num-seqs", "4", "--out", str(path)]) == 0
    trace = RoutingTrace.load(path)
    assert sorted(trace.tasks) == ["clsfy"] * 3 + ["code"] * 3
    lengths = np.bincount(trace.sample, minlength=trace.num_prompts)
    assert trace.prompt_length is not None
    for task, length, prompt in zip(trace.tasks, lengths, trace.prompt_length, strict=True):
        assert (prompt == 1) == (task == "code")
        assert task != "code" or length == TEXT_TOKENS - 1  # the last token feeds nothing


def test_prompts_of_a_file_are_run_in_its_order(model: Path, tmp_path: Path) -> None:
    texts = ["rhyme a poem on rain", "solve the sum"] * 6
    lines = [{"task": text.split()[-1], "prompt": f"{text} {number}"} for number, text in enumerate(texts)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["--model", str(model), "--prompts", str(tmp_path / "prompts.jsonl"), "--max-tokens", "3"]
    command += ["--max-num-seqs", "1", "--out", str(tmp_path / "t.npz"), "--profile", str(tmp_path / "p.json")]
    assert traces.main(command) == 0
    trace = RoutingTrace.load(tmp_path / "t.npz")
    assert trace.tasks == ["rain", "sum"] * 6
    assert trace.prompt_length is not None
    assert (trace.counts(first=2).sum(-1) <= 2 * 2).all()
    assert (trace.counts().sum((1, 2)) > trace.prompt_length).all()
    profile = TaskProfile.load(tmp_path / "p.json")
    assert set(profile.tasks) == {"rain", "sum"}
    assert "poem" in " ".join(profile.tasks["rain"].keywords)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "{}/there.npz"], "exists; choose another file"),
        (["--out", "{}/left.npz"], "was left unfinished; finish it with --recover"),
        (["--out", "{}/none/trace.npz"], "none does not exist"),
        (["--out", "{}/trace.txt"], "must be named *.npz"),
        (["--out", "{}/t.npz", "--max-tokens", "600"], "exceeds the model's 640"),
        (["--out", "{}/t.npz", "--profile", "{}/bad.json"], "task profile"),
        (["--out", "{}/t.npz", "--prompts", "{}/none.jsonl"], "none.jsonl: No such file"),
        (["--recover", "{}/t.npz"], "there is no recording to recover"),
        (["--out", "{}/t.npz", "--model", "{}/none"], "none"),
    ],
)
def test_mistakes_are_one_line(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture, arguments: list[str], message: str
) -> None:
    (tmp_path / "there.npz").touch()
    (tmp_path / "bad.json").write_text("[]")
    parts_of(tmp_path / "left.npz").mkdir()
    command = ["--model", str(model), "--tasks", "clsfy", "--per-task", "2", "--max-num-seqs", "1"]
    assert traces.main(command + [argument.replace("{}", str(tmp_path)) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "arguments", [[], ["--out", "t.npz", "--recover", "t.npz"], ["--out", "t.npz", "--per-task", "0"], ["--seed", "x"]]
)
def test_bad_flags_exit_with_2_and_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        traces.main(arguments)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
