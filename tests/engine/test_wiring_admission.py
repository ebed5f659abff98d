"""What the scheduler knows of answers, steps, experts and waiting, seen through an engine: each test fails when one of
the parts is taken out of it."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from emoe_jax import SLO, Engine, SamplingParams
from emoe_jax.device.dispatcher import Dispatcher
from emoe_jax.experts.loader_stats import LoaderStats
from emoe_jax.requests.contract import RoutingContract
from emoe_jax.residency.residency import Residency
from emoe_jax.tasks import Lengths, Task, TaskProfile
from tests.engines import RESIDENT, settle
from tests.residency.known import EXPERTS, LAYERS, TOP_K, favouring

ODD, EVEN = favouring(1, 3, 5), favouring(0, 2, 4)
PROFILE = TaskProfile(
    LAYERS,
    EXPERTS,
    TOP_K,
    tasks={"odd": Task(routing=ODD, output_length=Lengths.of([6])), "even": Task(routing=EVEN)},
)


def answer_of(tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two sequences at a time; experts follow the tasks at hand."""
    path = tmp_path_factory.mktemp("profile") / "tasks.json"
    PROFILE.save(path)
    options: dict[str, Any] = {"max_num_seqs": 2, "max_num_batched_tokens": 32, "overlap": False}
    options |= {"expert_memory": "3 slots", "task_profile": path, "policy": "static-task", "prefix_caching": False}
    return options | RESIDENT


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint: Path, options: dict[str, Any]) -> Iterator[Engine]:
    with Engine.load(tiny_checkpoint, **options) as engine:
        yield engine


@pytest.fixture
def engine(loaded: Engine) -> Iterator[Engine]:
    yield loaded
    for name in [*loaded._answers]:
        loaded.pop(name)
    while loaded.has_work():
        loaded.step()


def running(engine: Engine) -> list[str]:
    return [sequence.request_id for sequence in engine.parts.scheduler.running]


def start(engine: Engine, *names: str, tokens: tuple[int, ...], task: str | None = None) -> None:
    """Have these requests run, with answers of so many tokens."""
    for name, length in zip(names, tokens, strict=True):
        engine.add_request(name, [1, 2, 3], answer_of(length), task=task)
    while running(engine) != [*names]:
        engine.step()


@pytest.mark.parametrize("routing", ["exact", "resident"])
def test_a_request_whose_experts_take_long_to_come_waits_for_a_deadline(
    tiny_checkpoint: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, routing: RoutingContract
) -> None:
    """eMoE eq. 3: dE. Its experts are absent, and loads have taken very long so far."""
    with Engine.load(tiny_checkpoint, **options) as engine:  # a new one: wishes follow the requests before
        engine.add_request("tight", [1, 2, 3], answer_of(60), task="odd", slo=SLO(latency_ms=60_000))
        for _ in range(3):
            engine.step()
            settle(engine)
        assert engine.state()["residency"]["experts"] == [[1, 3, 5]] * LAYERS
        engine.add_request("loads", [1, 2, 3], answer_of(3), task="even", routing=routing)
        with monkeypatch.context() as patch:
            patch.setattr(
                Residency, "loads", LoaderStats(loads=1, commit_seconds=1e3, waited_loads=1, wait_seconds=1e3)
            )
            engine.step()
            assert running(engine) == ["tight"]
        engine.step()
        assert running(engine) == ["tight", "loads"]


def test_answers_are_expected_to_be_as_long_as_those_of_their_task(engine: Engine) -> None:
    """G, from the profile at first, then from the answers that were given."""
    engine.add_request("odd", [1, 2, 3], SamplingParams(max_tokens=50), task="odd")
    (sequence,) = engine.parts.scheduler.waiting
    assert sequence.expected_tokens == 6
    engine.pop("odd")
    for _ in range(20):
        engine.generate([1, 2, 3], answer_of(3), task="new")
    engine.add_request("new", [1, 2, 3], SamplingParams(max_tokens=50), task="new")
    (sequence,) = engine.parts.scheduler.waiting
    assert 3 <= sequence.expected_tokens < 5


def test_the_scheduler_learns_what_steps_take(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """c, both for a step of any kind and for a token of a running sequence."""
    engine.generate([1, 2, 3], answer_of(3))
    before = engine.state()["scheduler"]
    collect = Dispatcher.collect
    monkeypatch.setattr(Dispatcher, "collect", lambda *given: (time.sleep(0.1), collect(*given))[1])
    engine.generate([1, 2, 3], answer_of(40))
    after = engine.state()["scheduler"]
    assert after["seconds_per_token"] > before["seconds_per_token"] + 0.04
    assert after["cost"]["observed"] >= before["cost"]["observed"] + 40
    assert after["cost"]["step"] + after["cost"]["decode"] > 0.02


def test_a_sequence_that_has_waited_for_long_goes_first(engine: Engine) -> None:
    start(engine, "one", "two", tokens=(60, 10))
    engine.add_request("long", [1, 2, 3], answer_of(50), arrival=time.monotonic() - 29)
    engine.add_request("short", [1, 2, 3], answer_of(2))
    line = engine.parts.scheduler.line(time.monotonic(), 2)
    assert [sequence.request_id for sequence in line] == ["long", "short"]
    while "two" in running(engine):
        engine.step()
    engine.step()
    assert running(engine) == ["one", "long"]
