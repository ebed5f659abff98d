"""`python -m train.predictor`: training, resuming, judging, and what it says to bad input."""

import dataclasses
import functools
import json
from pathlib import Path

import numpy as np
import pytest

from emoe_jax.policies.transitions import load_transitions
from emoe_jax.predictor import Predictor, PredictorConfig, Prompts, network
from tests.traces.synthetic import make_trace
from train.predictor import __main__ as command
from train.predictor import coverage, evaluate, examples, trainer
from train.predictor.trainer import Checkpoints, Hyperparameters, StepReport

SMALL = ["--steps", "30", "--width", "8", "--members", "1", "--rate", "0.01"]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a trained predictor, and traces to train on, to judge by, and of another model."""
    path = tmp_path_factory.mktemp("predictor")
    make_trace(prompts=60).save(path / "train.npz")
    make_trace(prompts=20, seed=1).save(path / "later.npz")
    make_trace(prompts=12, layers=4).save(path / "other.npz")
    command.main(["--traces", str(path / "train.npz"), "--out", str(path / "out"), *SMALL])
    return path


def refused(capsys: pytest.CaptureFixture[str], argv: list[str]) -> str:
    """Run a command that must fail with status 2; its one line on standard error."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        command.main(argv)
    assert caught.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_training_leaves_all_that_is_promised(workplace):
    out = workplace / "out"
    assert {path.name for path in out.iterdir()} >= {
        "config.json",
        "memory.npz",
        "layers.npz",
        "dynamics.npz",
        "transitions.npz",
        "weights.safetensors",
        "metrics.json",
        "curves.png",
        "history.jsonl",
        "checkpoints",
    }
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["prompts"] == 7  # 12 % of 60 were held out
    assert metrics["remembered_prompts"] == 53
    assert len(Predictor.load(out).memory) == 60
    np.testing.assert_allclose(load_transitions(out / "transitions.npz", 3, 8, 2).sum(-1), 2, rtol=1e-3)
    assert [json.loads(line)["step"] for line in (out / "history.jsonl").read_text().splitlines()] == list(range(1, 31))


def test_judging_a_later_trace(workplace, tmp_path):
    argv = ["--evaluate", str(workplace / "out"), "--traces", str(workplace / "later.npz"), "--json"]
    command.main([*argv, str(tmp_path / "a.json")])
    numbers = json.loads((tmp_path / "a.json").read_text())
    assert list(numbers["coverage"]) == ["0.25", "0.5", "0.75"]
    rows = numbers["baselines"]
    assert set(rows) >= {
        "random",
        "global_frequency",
        "task_frequency",
        "previous_prompt",
        "ridge",
        "best_fixed_set",
        "shuffled_labels",
    }
    for residency, reached in numbers["coverage"].items():
        assert rows["best_fixed_set"][residency] >= reached > rows["global_frequency"][residency]
        assert abs(rows["random"][residency] - float(residency)) < 0.1
        assert rows["ridge"]["coverage"][residency] == rows["ridge"][residency]
    assert numbers["with_first_tokens"]["coverage"]["0.25"] > rows["task_frequency"]["0.25"]
    for question in ("given_earlier_layers", "given_last_tokens"):
        assert list(numbers[question]["coverage"]) == ["0.25", "0.5", "0.75"]
        assert 0 < numbers[question]["top_k"] <= 1
    assert (numbers["seen_prompts"], numbers["prompts"], numbers["unseen_tasks"]) == (0, 20, 0)
    command.main([*argv, str(tmp_path / "b.json"), "--no-updates"])
    fixed = json.loads((tmp_path / "b.json").read_text())
    assert fixed["coverage"] == fixed["baselines"]["without_updates"]["coverage"]


def test_judging_unseen_tasks_and_a_trace_without_embeddings(workplace, tmp_path):
    trace = make_trace(prompts=9, seed=2)
    strange = dataclasses.replace(trace, task_names=("new", "newer/task", "chat"), prompt_embedding=None)
    strange.save(tmp_path / "strange.npz")
    argv = ["--evaluate", str(workplace / "out"), "--traces", str(tmp_path / "strange.npz")]
    command.main([*argv, "--json", str(tmp_path / "a.json")])
    numbers = json.loads((tmp_path / "a.json").read_text())
    assert numbers["unseen_tasks"] == 2
    assert all(np.isfinite(value) for value in numbers["coverage"].values())


def test_judging_the_training_prompts_says_so(workplace, capsys):
    command.main(["--evaluate", str(workplace / "out"), "--traces", str(workplace / "train.npz")])
    assert "60 of these prompts were trained on" in capsys.readouterr().out


def test_bad_input_is_one_line_and_leaves_the_directory_alone(workplace, tmp_path, capsys):
    out, train = str(workplace / "out"), str(workplace / "train.npz")
    before = contents(workplace / "out")
    (tmp_path / "cut.npz").write_bytes((workplace / "train.npz").read_bytes()[:1000])
    make_trace(prompts=5).save(tmp_path / "few.npz")
    make_trace(prompts=9, dim=7).save(tmp_path / "wide.npz")
    (tmp_path / "empty").mkdir()
    cases = [
        (["--evaluate", out, "--traces", str(workplace / "other.npz")], "has 4 MoE layers of 8 experts, top-2"),
        (["--evaluate", out, "--traces", str(tmp_path / "cut.npz")], "is no .npz file, or the end of it is missing"),
        (["--evaluate", out, "--traces", str(tmp_path / "wide.npz")], "embeddings of 5 numbers"),
        (["--evaluate", out, "--traces", str(tmp_path / "none.npz")], "no such trace file"),
        (["--evaluate", str(tmp_path / "empty"), "--traces", train], "holds no predictor"),
        (["--out", out, "--traces", str(workplace / "other.npz")], "has 4 MoE layers of 8 experts, top-2"),
        (["--out", out, "--traces", str(workplace / "later.npz"), *SMALL], "another trace or with other options"),
        (["--out", out, "--traces", train, *SMALL, "--seed", "3"], "another trace or with other options"),
        (["--out", out, "--traces", str(tmp_path / "cut.npz")], "is no .npz file, or the end of it is missing"),
        (["--out", str(tmp_path / "new"), "--traces", str(tmp_path / "few.npz")], "5 prompts with routing"),
        (["--out", out], "--traces"),
        (["--traces", train], "one of the arguments --out --evaluate is required"),
        (["--out", out, "--traces", train, "--steps", "0"], "--steps is 0"),
        (["--out", out, "--traces", train, "--width", "9"], "--width is 9"),
        (["--out", out, "--traces", train, "--rate", "nan"], "--rate is nan"),
    ]
    for argv, message in cases:
        assert message in refused(capsys, argv)
    assert contents(workplace / "out") == before


def test_training_that_diverges_stops_and_keeps_earlier_checkpoints(workplace, tmp_path, monkeypatch, capsys):
    """Half of a run is made, then the targets become NaN, as they would from a broken kernel."""
    argv = ["--traces", str(workplace / "train.npz"), "--out", str(tmp_path / "out"), *SMALL]
    monkeypatch.setattr(command, "Hyperparameters", functools.partial(Hyperparameters, checkpoint_every=5))
    batch = examples.Examples.batch
    calls = iter(range(100))

    def breaking(*args, **kwargs):
        made = batch(*args, **kwargs)
        return made if next(calls) < 7 else made._replace(target=made.target * np.nan)

    monkeypatch.setattr(examples.Examples, "batch", breaking)
    assert "the loss is nan at step 8" in refused(capsys, argv)
    assert Checkpoints(tmp_path / "out" / "checkpoints").steps() == [5]
    monkeypatch.setattr(examples.Examples, "batch", batch)
    command.main(argv)
    assert len(Predictor.load(tmp_path / "out").memory) == 60


def test_a_killed_run_resumes_to_the_same_weights(tmp_path):
    prompts = Prompts.of(make_trace(prompts=40), first_tokens=4)
    config = PredictorConfig(3, 8, 2, embedding_dim=5, width=8, heads=2, blocks=1, members=1, first_tokens=4)
    split = examples.HeldOutSplit.draw(prompts, 0.2, 0)
    predictor, train, held_out = examples.prepare(prompts, split, config)
    plan = Hyperparameters(8, rows=8, evaluate_every=2, checkpoint_every=3)
    seen: list[StepReport] = []
    whole = trainer.run(predictor, train, held_out, plan, None, seen.append)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    trainer.run(predictor, train, held_out, plan, checkpoints, seen.append, stop_after=5)
    assert checkpoints.steps() == [3, 5]
    resumed = trainer.run(predictor, train, held_out, plan, checkpoints, seen.append)
    assert [line.step for line in seen] == [*range(1, 9), *range(1, 6), 6, 7, 8]
    for name, leaf in whole.averaged.items():
        np.testing.assert_allclose(resumed.averaged[name], leaf, atol=1e-6)
        np.testing.assert_allclose(resumed.best[name], whole.best[name], atol=1e-6)


def test_nothing_of_the_held_out_prompts_is_remembered():
    prompts = Prompts.of(make_trace(prompts=40), first_tokens=4)
    config = PredictorConfig(3, 8, 2, embedding_dim=5, width=8, heads=2)
    split = examples.HeldOutSplit.draw(prompts, 0.2, 0)
    assert sorted([*split.train, *split.held_out]) == list(range(40))
    predictor, train, held_out = examples.prepare(prompts, split, config)
    np.testing.assert_array_equal(predictor.memory.counts, prompts.counts[split.train])
    assert (len(train), len(held_out)) == (32, 8)


def test_predictions_in_order_learn_only_from_what_came_before():
    """Changing the routing of later prompts changes no earlier prediction."""
    prompts = Prompts.of(make_trace(prompts=60), first_tokens=4)
    config = PredictorConfig(3, 8, 2, embedding_dim=5, width=8, heads=2, blocks=1, members=1, first_tokens=4)
    asked = prompts.take(range(25, 60))
    changed = dataclasses.replace(asked, counts=np.concatenate([asked.counts[:20], asked.counts[:19:-1]]))
    results = []
    for given in (asked, changed):
        predictor = Predictor(config, prompts.take(range(25)))
        predictor.weights = network.init(config, predictor.sizes, 0)
        opinions, histories = evaluate.ask_in_order(predictor, given)
        results.append(predictor.correct(given, opinions[0], histories, False))
    np.testing.assert_allclose(results[0][:21], results[1][:21], rtol=1e-5)
    assert not np.allclose(results[0][34], results[1][34], rtol=1e-3)


def test_coverage_by_hand():
    counts = np.array([[[6, 3, 1, 0]], [[0, 0, 2, 0]]])
    predicted = np.array([[[0.4, 0.1, 0.3, 0.2]], [[0.1, 0.2, 0.3, 0.4]]])
    assert coverage.coverage_at(predicted, counts, 0.25) == pytest.approx(6 / 12)
    assert coverage.coverage_at(predicted, counts, 0.5) == pytest.approx((6 + 1 + 2) / 12)
    numbers = coverage.scores(predicted, counts, top_k=1)
    assert numbers["coverage_by_prompt"]["0.5"] == pytest.approx((0.7 + 1) / 2)
    assert numbers["precision"]["0.5"] == pytest.approx(3 / 4)
    assert numbers["recall"]["0.5"] == pytest.approx(3 / 4)
    assert numbers["top_k_accuracy"] == pytest.approx(1 / 2)
    assert numbers["kl"] > 0
    assert coverage.divergence(predicted, predicted) == pytest.approx(0, abs=1e-4)
