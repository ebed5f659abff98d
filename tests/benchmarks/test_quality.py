"""The arithmetic of `benchmarks.quality`, on cases made by hand."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from benchmarks.quality import scores, yardstick
from benchmarks.quality.measure import FULL, Traffic
from benchmarks.quality.one_prompt import RoutingBook
from benchmarks.quality.quantised import quantise, round_trip
from benchmarks.quality.scores import Row, interval, mean_over, perplexity_ratio, resamples
from benchmarks.quality.served import Cell, Outcome, config_of
from benchmarks.quality.traffic import PROMPT_TASKS, Count, Item, draw, in_bursts, wrongly_named
from emoe_jax import RequestOutput
from emoe_jax.checkpoint import Checkpoint, Tokenizer
from emoe_jax.checkpoint.safetensors import SafetensorsFile
from emoe_jax.errors import CheckpointError, ConfigError
from emoe_jax.models import load_tokenizer, open_checkpoint
from emoe_jax.requests.request import Completion
from serve.options import DEMO_MODEL
from tests.benchmarks.quality_samples import made_row
from train import prompts as labelled
from train.demo import evaluate
from train.demo.batches import Encoder
from train.sensitivity import __main__ as sensitivity
from train.tasks import texts

CELL = Cell("lru", "resident", 0.5)


def answered(text: str, token_ids: list[int], nats: float, tokens: int, lost: float = 0.0) -> Outcome:
    output = RequestOutput("a", [1], [Completion(0, text, token_ids)], None, "resident")
    return Outcome(output, nats, tokens, lost, lost / 2)


def read(nats: float, tokens: int) -> Outcome:
    return Outcome(None, nats, tokens, 0.25, 0.125)


def test_a_row_of_answers() -> None:
    items = [Item("qa", (1,), (2, 3), answer) for answer in ("red", "two blue dogs")]
    reference = [answered("red", [5, 1], 1.0, 2), answered("two blue dogs", [6, 7, 8, 1], 2.0, 4)]
    found = [answered(" red ", [5, 1], 1.0, 2, 0.5), answered("two dogs", [6, 8, 1], 2.0 + 6 * math.log(2), 4)]
    row = scores.row(CELL, items, [found], reference, seed=0)
    assert row.numbers == {
        "exact_match": 0.5,
        "similarity": (1 + 1 / 4) / 2,
        "rouge_l": pytest.approx((1 + 2 * 2 / 5) / 2),
        "perplexity_ratio": pytest.approx(2),  # 6 ln 2 over 6 tokens
        "substituted": 0.25,
        "substituted_weight": 0.125,
    }
    low, high = row.as_json()["ci95"]["exact_match"]
    assert (low, high) == (0, 1)  # of two prompts, one right
    low, high = row.as_json()["ci95"]["perplexity_ratio"]
    assert (low, high) == (1, pytest.approx(2 ** (6 / 4)))  # all prompts the first; all the second


def test_several_runs_of_a_cell_count_as_their_mean_and_prompts_are_resampled_not_runs() -> None:
    items = [Item("qa", (1,), (2, 3), answer) for answer in ("red", "blue")]
    reference = [answered("red", [5, 1], 1.0, 2), answered("blue", [6, 1], 1.0, 2)]
    fine, wrong = [answered("red", [5, 1], 1.0, 2), reference[1]], [answered("no", [9, 9], 3.0, 2, 1.0), reference[1]]
    row = scores.row(CELL, items, [fine, wrong, wrong, wrong], reference, seed=0)
    assert row.numbers["exact_match"] == pytest.approx((0.25 + 1) / 2)
    assert row.numbers["substituted"] == pytest.approx(0.75 / 2)
    assert row.numbers["perplexity_ratio"] == pytest.approx(math.exp(1.5 / 4))
    assert row.as_json()["ci95"]["exact_match"] == pytest.approx([0.25, 1])


def test_a_row_of_texts_has_no_answers() -> None:
    items = [Item("code", (1,), (2, 3, 4, 5), None)] * 3
    row = scores.row(CELL, items, [[read(3.0, 4)] * 3], [read(1.0, 4)] * 3, seed=0)
    as_json = row.as_json()
    assert [as_json[name] for name in ("exact_match", "similarity", "rouge_l")] == [None] * 3
    assert as_json["perplexity_ratio"] == pytest.approx(math.exp(0.5))
    assert sorted(as_json["ci95"]) == ["perplexity_ratio", "substituted", "substituted_weight"]
    assert as_json["ci95"]["perplexity_ratio"] == pytest.approx([math.exp(0.5)] * 2)


def test_answers_compared_by_an_embedding_model() -> None:
    items = [Item("conv", (1,), (2,), "x")] * 2
    reference = [answered("red", [5], 1.0, 1), answered("same", [6], 1.0, 1)]
    found = [answered("green", [9], 1.0, 1), answered("same", [6], 1.0, 1)]

    def embed(given: list[str]) -> np.ndarray:
        return np.array([{"red": [1, 0], "green": [0.6, 0.8], "same": [0, 0]}[text] for text in given], float)

    numbers = scores.row(CELL, items, [found], reference, 0, embed).numbers  # pyright: ignore[reportArgumentType]
    assert numbers["embedding_similarity"] == pytest.approx((0.6 + 1) / 2)


def test_perplexity_ratios_weigh_tokens_not_prompts() -> None:
    assert perplexity_ratio(np.array([2 * math.log(2), 0.0]), np.array([2.0, 6.0])) == pytest.approx(2**0.25)
    assert perplexity_ratio(np.array([1e9]), np.array([1.0])) == math.exp(700)  # a number, whatever was lost


def test_intervals_are_those_of_the_mean() -> None:
    right = np.repeat([0.0, 1.0], 50)
    low, high = interval(right[resamples(100, seed=3, name="qa")].mean(axis=1))
    assert (low, high) == (pytest.approx(0.5 - 1.96 * 0.05, abs=0.015), pytest.approx(0.5 + 1.96 * 0.05, abs=0.015))
    assert interval(np.full(2000, 0.25)) == (0.25, 0.25)


def test_resamples_follow_from_seed_and_task() -> None:
    first = resamples(30, 0, "qa")
    assert first.shape == (scores.RESAMPLES, 30)
    assert (first == resamples(30, 0, "qa")).all()
    assert (first != resamples(30, 1, "qa")).any()
    assert (first != resamples(30, 0, "sum")).any()
    assert (first.min(), first.max()) == (0, 29)


def test_means_over_tasks() -> None:
    rows = [made_row(CELL, task, similarity=value) for task, value in (("qa", 0.2), ("sum", 0.8))]
    assert mean_over("similarity", rows) == pytest.approx((0.5, 0.49, 0.51), abs=1e-3)
    rows = [made_row(CELL, kind, perplexity_ratio=value) for kind, value in (("code", 1.0), ("prose", 4.0))]
    mean, low, high = mean_over("perplexity_ratio", rows)
    assert mean == pytest.approx(2)
    assert low < mean < high


def grid(**changes: dict[str, float]) -> list[Row]:
    """Rows on which everything holds; `changes` has exact matches or ratios by policy."""
    at = {
        "full": {"qa": 0.9, "facts": 0.8, "sum": 0.5, "code": 1.0, "prose": 1.0},
        "random": {"qa": 0.7, "facts": 0.5, "sum": 0.45, "code": 1.3, "prose": 1.25},
        "static-global": {"qa": 0.5, "facts": 0.6, "sum": 0.4, "code": 1.2, "prose": 1.2},
        "emoe": {"qa": 0.8, "facts": 0.7, "sum": 0.5, "code": 1.1, "prose": 1.1},
    }
    rows = []
    for policy, numbers in at.items():
        cell = FULL if policy == "full" else Cell(policy, "resident", yardstick.SHARE)
        for task, value in (numbers | changes.get(policy.replace("-", "_"), {})).items():
            if task in texts.KINDS:
                rows.append(made_row(cell, task, perplexity_ratio=value))
            else:
                rows.append(made_row(cell, task, exact_match=value, similarity=value, perplexity_ratio=1.0))
    # What is not at 40 % under `resident` counts for nothing.
    rows.append(made_row(Cell("random", "exact", yardstick.SHARE), "qa", exact_match=1.0, similarity=1.0))
    rows.append(made_row(Cell("random", "resident", 0.2), "code", perplexity_ratio=0.1))
    return rows


@pytest.mark.parametrize(
    ("changes", "holds"),
    [
        ({}, [True, True, True, True, True]),
        ({"random": {"facts": 0.61}}, [False, True, True, True, True]),  # 19 points
        ({"random": {"facts": 0.6}}, [True, True, True, True, True]),
        ({"random": {"qa": 0.75}}, [False, True, True, True, True]),  # facts alone
        ({"random": {"qa": 0.75, "sum": 0.25}}, [True, True, True, True, True]),
        ({"random": {"prose": 1.24}}, [True, False, True, True, True]),
        ({"emoe": {"qa": 0.51, "facts": 0.61, "sum": 0.41}}, [True, True, False, False, True]),  # they overlap
        ({"emoe": {"code": 1.19, "prose": 1.19}}, [True, True, True, True, False]),
        ({"emoe": {"code": 1.3, "prose": 1.3}}, [True, True, True, True, False]),
    ],
)
def test_the_yardstick(changes: dict[str, dict[str, float]], holds: list[bool]) -> None:
    found = yardstick.verdicts(grid(**changes))
    assert [verdict.holds for verdict in found] == holds
    assert [verdict.required for verdict in found] == [True, True, True, False, False]


def test_the_yardstick_says_what_it_goes_by() -> None:
    found = yardstick.verdicts(grid())
    assert found[0].numbers == "sum 5.0, qa 20.0, facts 30.0"
    assert found[1].numbers == "prose x1.25, code x1.30"
    assert found[2].numbers == "static-global 50.0% [49.0%, 51.0%], emoe 66.7% [65.7%, 67.6%]"


@pytest.mark.parametrize("policy", ["full", "random", "static-global", "emoe"])
def test_what_was_not_run_is_not_judged(policy: str) -> None:
    rows = [row for row in grid() if row.cell.policy != policy]
    concerned = {"full": [0], "random": [0, 1], "static-global": [2, 3, 4], "emoe": [2, 3, 4]}[policy]
    found = yardstick.verdicts(rows)
    assert [index for index, verdict in enumerate(found) if verdict.holds is None] == concerned


def test_tasks_come_in_bursts() -> None:
    items = {task: [Item(task, (number,), (), "") for number in range(count)] for task, count in (("a", 7), ("b", 5))}
    items["c"] = []
    stream = in_bursts(items, seed=1, burst=3)
    assert len(stream) == 12
    for task, all_of_it in items.items():
        assert [item for item in stream if item.task == task] == all_of_it
    for start in range(0, 6, 3):  # the first two rounds but for the last burst of b
        assert len({item.task for item in stream[start : start + 3]}) == 1
    assert {item.task for item in stream[:6]} == {"a", "b"}
    assert stream == in_bursts(items, seed=1, burst=3)
    orders = {tuple(dict.fromkeys(item.task for item in in_bursts(items, seed))) for seed in range(20)}
    assert len(orders) == 2


@pytest.fixture(scope="module")
def demo() -> tuple[Checkpoint, Tokenizer]:
    checkpoint = open_checkpoint(DEMO_MODEL)
    tokenizer = load_tokenizer(checkpoint.directory)
    assert tokenizer is not None
    return checkpoint, tokenizer


@pytest.mark.parametrize("kind", texts.KINDS)
def test_texts_are_those_that_training_holds_out(demo: tuple[Checkpoint, Tokenizer], kind: str) -> None:
    checkpoint, tokenizer = demo
    items, missing = draw(tokenizer, checkpoint.config, [kind], "test", 3, Count(1, 4))
    assert missing == {}
    encoder = Encoder(tokenizer.backend.backend_tokenizer)
    wanted = evaluate.held_out_text(encoder, kind, 3, 4)
    assert [[*item.prompt, *item.scored] for item in items[kind]] == wanted
    assert all(len(item.prompt) == 1 and item.answer is None for item in items[kind])


def test_prompts_are_scored_by_their_true_answers(demo: tuple[Checkpoint, Tokenizer]) -> None:
    checkpoint, tokenizer = demo
    items, _ = draw(tokenizer, checkpoint.config, ["facts", "clsfy"], "test", 0, Count(3, 1))
    for task, drawn in items.items():
        assert [item.task for item in drawn] == [task] * 3  # a fact's own task is qa
        for item in drawn:
            *answer, end = item.scored
            assert tokenizer.decode(answer) == item.answer
            assert end == checkpoint.config.eos_token_ids[0]
    train, _ = draw(tokenizer, checkpoint.config, ["facts"], "train", 0, Count(3, 1))
    assert [item.prompt for item in train["facts"]] != [item.prompt for item in items["facts"]]


def test_a_kind_of_text_without_its_package_is_left_out(
    demo: tuple[Checkpoint, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    def passage(kind: str, *_: object) -> str:
        raise ImportError(f"the package of {kind} is missing")

    monkeypatch.setattr(texts, "passage", passage)
    items, missing = draw(demo[1], demo[0].config, ["french", "qa", "prose"], "test", 0, Count(2, 2))
    assert list(items) == ["qa"]
    assert missing == {kind: f"the package of {kind} is missing" for kind in ("french", "prose")}


def test_rows_are_plain_json() -> None:
    row = made_row(CELL, "qa", similarity=0.5)
    assert {"policy", "contract", "share", "task", "items", *scores.METRICS, "ci95"} == set(row.as_json())
    assert [row.as_json()[name] for name in ("policy", "contract", "share")] == ["lru", "resident", 0.5]


def test_some_prompts_name_another_task_and_texts_none() -> None:
    stream = [Item(task, (1,), (2,), "x") for task in ("qa", "sum", "comp") for _ in range(40)]
    stream += [Item("prose", (1,), (2,), None)] * 5
    assert wrongly_named(stream, 0.0, seed=3) == stream
    wrong = {
        share: [a != b for a, b in zip(wrongly_named(stream, share, 3), stream, strict=True)] for share in (0.3, 1.0)
    }
    assert sum(wrong[1.0]) == 120
    assert not any(wrong[1.0][120:])
    assert 20 < sum(wrong[0.3]) < 55
    assert {item.task for item in wrongly_named(stream, 1.0, 3)} == {"qa", "sum", "comp", "prose"}
    assert all(b for a, b in zip(wrong[0.3], wrong[1.0], strict=True) if a)


def test_a_cells_own_options_go_before_the_others() -> None:
    cell = dataclasses.replace(CELL, options=(("predict_every", 40), ("seed", 7)))
    config = config_of(cell, 128, 4, seed=1)
    assert (config.predict_every, config.seed, config.max_num_seqs, config.policy) == (40, 7, 4, "lru")
    with pytest.raises(ConfigError):
        config_of(dataclasses.replace(CELL, options=(("predict_every", -1),)), 128, 4, seed=1)


@pytest.mark.parametrize(("bits", "steps"), [(8, 127), (4, 7)])
def test_rounded_weights_are_within_half_a_step(bits: int, steps: int) -> None:
    weight = np.random.default_rng(0).normal(size=(6, 64)).astype(np.float32)
    found = round_trip(weight, bits)
    groups = weight.reshape(6, -1, 64 if bits == 8 else 32)
    step = np.repeat(np.abs(groups).max(-1) / steps, groups.shape[-1], axis=1)
    assert (np.abs(found - weight) <= 0.501 * step).all()
    assert np.unique(found[0, :32]).size <= 2 * steps + 1
    np.testing.assert_allclose(round_trip(found, bits), found, rtol=1e-5)


def test_a_quantised_checkpoint_has_the_same_tensors_and_says_its_size(tmp_path: Path) -> None:
    sizes = quantise(DEMO_MODEL, tmp_path / "int4", 4)
    before, after = (open_checkpoint(path) for path in (DEMO_MODEL, tmp_path / "int4"))
    assert before.config.num_experts == after.config.num_experts
    same, rounded = (SafetensorsFile(path / "model.safetensors") for path in (DEMO_MODEL, tmp_path / "int4"))
    assert set(same.tensors) == set(rounded.tensors)
    for name in same.tensors:
        old, new = np.asarray(same.tensor(name), np.float32), rounded.tensor(name)
        is_kept = old.ndim == 1 or ".layers." not in name or name.endswith("gate.weight")
        assert np.array_equal(old, new) == is_kept, name
    assert sizes.before == sum(2 * same.tensor(name).size for name in same.tensors)
    assert sizes.experts_after / sizes.experts_before == pytest.approx((0.5 + 2 / 32) / 2)
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        quantise(tmp_path, tmp_path / "none", 8)


def test_a_routing_book_says_of_each_request_how_it_was_routed() -> None:
    counts = [np.eye(2, 4, k, dtype=np.int64) * 3 for k in range(3)]
    noted = RoutingBook(2, 4)
    for each in counts:
        np.testing.assert_allclose(noted.predict_next([("qa", None)], 4)[0], 0.25)
        noted.observe("qa", each, None)
    told = RoutingBook(2, 4, noted.counts)
    for each in counts:
        np.testing.assert_allclose(told.predict_next([("qa", None)], 4)[0], each / 3)
        told.observe("qa", each, None)
    np.testing.assert_allclose(told.predict_next([("qa", None)], 4)[0], 0.25)


def test_nothing_that_is_asked_was_learned_from() -> None:
    """Neither the table of `static-global`, nor the sensitivity that the demo ships by its default command."""
    traffic = Traffic.of(str(DEMO_MODEL), PROMPT_TASKS, Count(64, 0), seed=0)
    asked = {item.prompt for items in traffic.items.values() for item in items}
    assert asked.isdisjoint({item.prompt for items in traffic.calibration.values() for item in items})
    options = sensitivity.arguments([])
    drawn = labelled.drawn(options.tasks, options.split, options.seed, options.prompts_per_task)
    tokenizer = load_tokenizer(DEMO_MODEL)
    assert tokenizer is not None
    assert asked.isdisjoint({tuple(prompt.token_ids(tokenizer)) for prompt in drawn})
