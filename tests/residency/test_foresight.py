"""Residency planned by request, seen through a whole engine."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emoe_jax import ConfigError, Engine, RequestError, SamplingParams
from emoe_jax.engine.quality import Quality
from emoe_jax.models import config_from_hf
from emoe_jax.policies.policy import ResidencyPolicy
from emoe_jax.policies.transitions import TRANSITIONS_FILE, save_transitions
from emoe_jax.predictor import Predictor, PredictorConfig, Prompts, network
from emoe_jax.requests.sequence import Sequence
from emoe_jax.residency.accounts import MOST_TASKS, TaskAccounts
from emoe_jax.tasks import Lengths, Task, TaskProfile
from tests.engines import RESIDENT, TINY, settle

LAYERS, EXPERTS, TOP_K = 3, 8, 2
PARAMS = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)


def favouring(*experts: int) -> np.ndarray:
    shares = np.full((LAYERS, EXPERTS), 0.05 / EXPERTS)
    shares[:, experts] += 0.95 / len(experts)
    return shares


PROFILE = TaskProfile(
    LAYERS,
    EXPERTS,
    TOP_K,
    tasks={
        "odd": Task(routing=favouring(1, 3, 5), output_length=Lengths.of([6])),
        "even": Task(routing=favouring(0, 2, 4), output_length=Lengths.of([6])),
        "deaf": Task(routing=favouring(5, 6, 7), sensitivity=(0.0,) * LAYERS),
    },
)


@pytest.fixture(scope="module")
def engine(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    path = tmp_path_factory.mktemp("profile") / "tasks.json"
    PROFILE.save(path)
    options = {"max_num_seqs": 2, "max_num_batched_tokens": 16, "policy": "emoe-no-refresh"} | RESIDENT
    with Engine.load(tiny_checkpoint, expert_memory="3 slots", task_profile=path, **options) as engine:
        yield engine


def serve(engine: Engine, task: str) -> list[list[int]]:
    """Answer prompts of a task until their loads are in; the residents of each layer."""
    for _ in range(3):
        engine.generate([3, 1, 4, 1, 5], PARAMS, task=task)
        settle(engine)
    return [layer.tolist() if hasattr(layer, "tolist") else layer for layer in engine.state()["residency"]["experts"]]


def test_residents_follow_the_task_at_hand(engine: Engine) -> None:
    assert serve(engine, "odd") == [[1, 3, 5]] * LAYERS
    assert serve(engine, "even") == [[0, 2, 4]] * LAYERS


def test_experts_stay_with_those_that_run_until_they_end(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Of waiting requests, which have all their tokens to come, eq. 2 would make more than of running ones."""
    path = tmp_path / "tasks.json"
    PROFILE.save(path)
    planned: list[tuple[tuple[str, ...], set[str]]] = []
    with Engine.load(tiny_checkpoint, expert_memory="3 slots", task_profile=path, max_num_seqs=2, **RESIDENT) as engine:
        for number, task in enumerate(("odd", "even", "odd", "even")):
            engine.add_request(str(number), [3, 1, 4, 1, 5, 9, 2, 6], PARAMS, task=task)
        planner, scheduler = engine.parts.planner, engine.parts.scheduler
        assert planner is not None
        while engine.has_work():
            engine.step()
            planned.append((planner.planned, {sequence.request_id for sequence in scheduler.waiting}))
    assert len({names for names, _ in planned}) > 1
    assert all(waiting.isdisjoint(names) for names, waiting in planned)


def test_the_policy_is_told_prompts_from_answers(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, list[tuple[int, int]]]] = []  # wishes of a layer by single tokens; chunks with theirs
    observe = ResidencyPolicy.observe

    def noted(self: ResidencyPolicy, counts: np.ndarray, chunks: Any = ()) -> None:
        told.append((int(counts[0].sum()), [(chunk.tokens, int(chunk.counts[0].sum())) for chunk in chunks]))
        observe(self, counts, chunks)

    monkeypatch.setattr(ResidencyPolicy, "observe", noted)
    engine.add_request("first", [3, 1, 4], PARAMS)
    engine.step()
    engine.add_request("second", [2, 7, 1, 8, 2, 8, 1], PARAMS)
    while engine.has_work():
        engine.step()
    assert told[0] == (0, [(3, 3 * TOP_K)])
    assert (TOP_K, [(7, 7 * TOP_K)]) in told  # one decodes while the other's prompt is read
    assert (2 * TOP_K, []) in told
    told.clear()
    engine.add_request("aborted", [2, 7, 1, 8, 2, 8, 1], PARAMS)
    engine.loop._dispatch()
    engine.abort("aborted")
    engine.generate([3, 1, 4], PARAMS)
    assert told[0] == (0, [(7, 7 * TOP_K)])  # what has ended meanwhile is no crowd of single tokens


def test_a_task_that_needs_no_expert_in_particular_loads_none(engine: Engine) -> None:
    before = serve(engine, "odd")
    assert serve(engine, "deaf") == before


def test_nothing_is_planned_where_all_are_resident(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = []
    with Engine.load(tiny_checkpoint, expert_memory="100%") as engine:
        monkeypatch.setattr(engine.parts.planner, "plan_for", planned.append)
        engine.generate([3, 1, 4, 1, 5], PARAMS)
    with Engine.load(tiny_checkpoint, expert_memory="3 slots", **RESIDENT) as engine:
        monkeypatch.setattr(engine.parts.planner, "plan_for", planned.append)
        assert planned == []
        engine.generate([3, 1, 4, 1, 5], PARAMS)
    assert planned


def test_what_answers_lost_is_booked_by_task(engine: Engine) -> None:
    serve(engine, "odd")
    booked = engine.state()["tasks"]["odd"]
    assert booked["requests"] >= 3
    assert 0 < booked["substituted"] < 1
    assert 0 < booked["substituted_weight"] < 1
    requests = booked["requests"]
    engine.generate([3, 1, 4], PARAMS, task="odd", routing="exact")
    assert engine.state()["tasks"]["odd"]["requests"] == requests + 1


def test_tasks_that_clients_make_up_are_not_kept_without_end() -> None:
    accounts = TaskAccounts(TOP_K)
    for number in range(3 * MOST_TASKS):
        accounts.add([Sequence("id", [1], task=f"task {number}", assigned=4, substituted=1)])
    state = accounts.state()
    assert len(state) == MOST_TASKS + 1
    assert state["other"] == {"requests": 2 * MOST_TASKS, "substituted": 0.25, "substituted_weight": 0.0}


def test_quality_compares_the_residents_with_all_experts(engine: Engine) -> None:
    serve(engine, "odd")
    text = [3, 1, 4, 1, 5, 9, 2, 6]
    resident = engine.logits(text, "resident")  # before `exact`, which loads other experts
    quality = engine.quality(text)
    full = engine.logits(text, "exact")
    picked = np.arange(len(text) - 1), text[1:]
    for logits, perplexity in ((resident, quality.perplexity), (full, quality.full_perplexity)):
        odds = np.exp(logits[:-1] - logits[:-1].max(axis=-1, keepdims=True))
        odds /= odds.sum(axis=-1, keepdims=True)
        assert perplexity == pytest.approx(np.exp(-np.log(odds[picked]).mean()), rel=1e-3)
    assert quality.kl > 0
    assert Quality.of(text, full, full).kl == pytest.approx(0, abs=1e-6)
    with pytest.raises(RequestError, match="1 tokens"):
        engine.quality([3])


def test_layers_that_spread_get_more_slots(tiny_checkpoint: Path, tmp_path: Path) -> None:
    shares = favouring(1, 3)
    shares[0] = 1 / EXPERTS
    path = tmp_path / "tasks.json"
    TaskProfile(LAYERS, EXPERTS, TOP_K, tasks={"odd": Task(routing=shares)}).save(path)
    with Engine.load(tiny_checkpoint, expert_memory="50%", task_profile=path) as engine:
        assert engine.state()["residency"]["slots"] == [8, 2, 2]
    with Engine.load(tiny_checkpoint, expert_memory="4 slots", task_profile=path) as engine:
        assert engine.state()["residency"]["slots"] == [4, 4, 4]


@pytest.fixture(scope="module")
def predictor_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A predictor that remembers prompts which used experts 1, 3, 5 or 0, 2, 4, and a table in which 5 and 6 follow
    whatever was chosen."""
    folder = tmp_path_factory.mktemp("predictor")
    config = PredictorConfig(LAYERS, EXPERTS, TOP_K, embedding_dim=TINY["hidden_size"], width=8, heads=2, members=1)
    counts = np.stack([(100 * favouring(*experts)).astype(np.int32) for experts in ((1, 3, 5), (0, 2, 4))] * 4)
    remembered = Prompts(("odd", "even") * 4, np.eye(8, TINY["hidden_size"], dtype=np.float32), counts, counts)
    predictor = Predictor(config, remembered)
    predictor.weights = network.init(config, predictor.sizes, 0)
    predictor.save(folder)
    follow = np.isin(np.arange(EXPERTS), (5, 6)).astype(np.float32)
    save_transitions(folder / TRANSITIONS_FILE, np.tile(follow, (LAYERS - 1, EXPERTS, 1)))
    return folder


def test_the_next_layers_experts_follow_from_the_table(tiny_checkpoint: Path, predictor_folder: Path) -> None:
    with Engine.load(
        tiny_checkpoint, predictor=predictor_folder, expert_memory="3 slots", policy="next-layer-router", **RESIDENT
    ) as engine:
        first, *later = serve(engine, "odd")
    assert first == [0, 1, 2]  # no layer is before it, and nothing was profiled
    assert all({5, 6} <= set(layer) for layer in later)


def test_activations_are_those_of_the_requests_at_hand(tiny_checkpoint: Path, predictor_folder: Path) -> None:
    with Engine.load(
        tiny_checkpoint, predictor=predictor_folder, expert_memory="3 slots", policy="activation-matrix", **RESIDENT
    ) as engine:
        for _ in range(3):
            serve(engine, "odd")
        residents = serve(engine, "odd")
        state = engine.parts.residency.policy.state
    # The last request's alone: 8 tokens that its plan counts for, at most 5 of the prompt and 6 of the answer.
    tokens = state.counts.sum(-1) / TOP_K
    assert ((tokens > 8 - 1e-3) & (tokens < 8 + 5 + 6 + 1e-3)).all()
    assert all(set(layer) in ({1, 3, 5}, {0, 2, 4}) for layer in residents)


def test_a_damaged_table_is_refused_and_a_missing_one_asked_for(
    tiny_checkpoint: Path, predictor_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "predictor"
    shutil.copytree(predictor_folder, folder)
    (folder / TRANSITIONS_FILE).write_bytes(b"damaged")
    with pytest.raises(ConfigError, match="holds no transitions"):
        Engine.load(tiny_checkpoint, predictor=folder)
    (folder / TRANSITIONS_FILE).unlink()
    with pytest.raises(ConfigError, match=r"`python -m train\.predictor .*` writes transitions\.npz"):
        Engine.load(tiny_checkpoint, predictor=folder, policy="next-layer-router")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"predict_every": 0}, "predict_every"),
        ({"link_bandwidth": 0.0}, "link_bandwidth is 0.0"),
        ({"link_bandwidth": "fast"}, "link_bandwidth"),
        ({"policy": "belady"}, "policy is 'belady'; expected one of activation-matrix, emoe"),
        ({"policy": "next-layer-router"}, "learned from a trace"),
        ({"policy": "activation-matrix"}, "learned from a trace"),
        ({"predictor": "/nowhere"}, "nowhere"),
    ],
)
def test_bad_options_are_refused_by_name(tiny_checkpoint: Path, options: dict, message: str) -> None:
    with pytest.raises(Exception, match=message) as caught:
        Engine.load(tiny_checkpoint, **options)
    assert "\n" not in str(caught.value)
    if "predictor" not in options:
        assert isinstance(caught.value, ConfigError)


def test_a_bandwidth_is_checked_before_anything_is_read() -> None:
    with pytest.raises(ConfigError, match="link_bandwidth 'fast' is not an amount of bytes"):
        Engine.load("/nonexistent", link_bandwidth="fast")


def test_a_profile_of_another_model_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    config = config_from_hf(TINY | {"num_local_experts": 4})
    TaskProfile.empty(config).save(tmp_path / "tasks.json")
    with pytest.raises(ConfigError, match="of a model with"):
        Engine.load(tiny_checkpoint, task_profile=tmp_path / "tasks.json")
