"""Nothing compiles after warm-up, with all that an engine does by default: policy, predictor, learning, trade."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emoe_jax import Engine, SamplingParams
from emoe_jax.device.runner import FIRST_PIECES
from emoe_jax.experts.pieces import staging_bytes
from emoe_jax.memory import trade
from emoe_jax.predictor import Predictor, PredictorConfig, Prompts, network
from emoe_jax.requests.contract import RoutingContract
from emoe_jax.residency import forecaster
from emoe_jax.tasks import Lengths, Task, TaskProfile
from tests.compilations import heard_compilations
from tests.engines import TINY

LAYERS, EXPERTS, TOP_K = 3, 8, 2
PAGE = 16 * LAYERS * 2 * 2 * 8 * 4
TURNS = 24
CONTRACTS: tuple[tuple[RoutingContract, RoutingContract], ...] = (
    ("resident", "resident"),
    ("exact", "exact"),
    ("exact", "resident"),
)
"""Of two requests that run at once."""


def favouring(*experts: int) -> np.ndarray:
    shares = np.full((LAYERS, EXPERTS), 0.05 / EXPERTS)
    shares[:, experts] += 0.95 / len(experts)
    return shares


ROUTING = {"odd": favouring(1, 3, 5), "even": favouring(0, 2, 4)}


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A task profile and a predictor of the tiny model's shape."""
    folder = tmp_path_factory.mktemp("known")
    tasks = {name: Task(routing=shares, output_length=Lengths.of([6])) for name, shares in ROUTING.items()}
    TaskProfile(LAYERS, EXPERTS, TOP_K, tasks=tasks).save(folder / "tasks.json")
    config = PredictorConfig(LAYERS, EXPERTS, TOP_K, embedding_dim=TINY["hidden_size"], width=8, heads=2, members=1)
    counts = np.stack([(100 * shares).astype(np.int32) for shares in ROUTING.values()] * 4)
    predictor = Predictor(
        config, Prompts(("odd", "even") * 4, np.eye(8, TINY["hidden_size"], dtype=np.float32), counts, counts)
    )
    predictor.weights = network.init(config, predictor.sizes, 0)
    predictor.save(folder / "predictor")
    return {"task_profile": folder / "tasks.json", "predictor": folder / "predictor"}


@pytest.mark.parametrize("overlap", [False, True], ids=["plain", "overlapped"])
def test_the_default_policy_its_predictor_learning_and_a_trade(
    tiny_checkpoint: Path, known: dict[str, Any], overlap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trade, "DWELL_SECONDS", 0.0)
    monkeypatch.setattr(forecaster, "LEARNING_SHARE", 1e9)  # it may learn at any time
    refits = []
    refit = Predictor.refit
    monkeypatch.setattr(Predictor, "refit", lambda self: refits.append(self.num_unlearned) or refit(self))
    few: dict[str, Any] = {"max_model_len": 96, "max_num_seqs": 2, "max_num_batched_tokens": 8}
    few |= {"expert_memory": "6 slots", "kv_memory": 7 * PAGE, "memory_trade": True}
    with (
        heard_compilations() as heard,
        Engine.load(tiny_checkpoint, **few, **known, overlap=overlap, predict_every=2) as engine,
    ):
        planner = engine.parts.planner
        assert planner is not None
        assert planner.invocations is not None
        planner.invocations.forecaster.refit_every = 3
        engine.warm_up()
        assert heard
        heard.clear()
        refits.clear()
        rng = np.random.default_rng(0)
        for turn in range(TURNS):
            # Two long answers need more pages than there are, so that slots are traded; a short one gives them back.
            long = turn % 2 == 0
            for index in range(1 + long):
                engine.add_request(
                    f"{turn}/{index}",
                    rng.integers(0, 60, size=17 if long else 5).tolist(),
                    SamplingParams(
                        max_tokens=70 if long else 3, ignore_eos=True, temperature=float(turn % 3 == 0), seed=turn
                    ),
                    task=("odd", "even")[turn // 2 % 2],
                    routing=CONTRACTS[turn // 4 % 3][index],
                )
            while engine.has_work():
                engine.step()
            planner.invocations.forecaster.join()
        state = engine.state()
        assert heard == []
    assert state["planner"]["error"] is None
    assert state["planner"]["predictions"] >= 3
    assert len(refits) >= 2
    assert max(refits) >= 3
    assert state["memory_trade"]["trades"] >= 2
    assert state["residency"]["loads"]["loads"] > sum(state["residency"]["slots"])


def test_loads_ahead_within_a_step(tiny_checkpoint: Path) -> None:
    """The next layer's router on this layer's input is a shape of its own, for batches and chunks alike."""
    options: dict[str, Any] = {"max_model_len": 96, "max_num_seqs": 2, "max_num_batched_tokens": 8}
    options |= {"expert_memory": "3 slots", "policy": "pre-gated", "routing": "exact"}
    with heard_compilations() as heard, Engine.load(tiny_checkpoint, **options) as engine:
        engine.warm_up()
        assert heard
        memory, runner = engine.memory, engine.parts.runner
        assert memory.workspace_bytes == staging_bytes(memory.sizes.slot) + runner.workspace_bytes
        assert runner.workspace_bytes > runner.executables.workspace_bytes
        heard.clear()
        for number in range(6):
            prompts = [list(range(1, 2 + number * 3)), [number] * 9]
            engine.generate(prompts[: 1 + number % 2], SamplingParams(max_tokens=5, temperature=0))
        ahead = engine.state()["residency"]["ahead"]
        assert heard == []
    assert ahead["spared"] + ahead["late"] > 0


def test_the_first_pieces_of_a_warm_up_are_enough_for_a_short_prompt_alone_and_all_of_them_for_every_shape(
    tiny_checkpoint: Path,
) -> None:
    options: dict[str, Any] = {"max_model_len": 96, "max_num_seqs": 2, "max_num_batched_tokens": 64}
    params = SamplingParams(max_tokens=5, temperature=0)
    options |= {"expert_memory": "3 slots", "routing": "resident", "audit_rate": 0.0}
    with heard_compilations() as heard, Engine.load(tiny_checkpoint, **options) as engine:
        pieces = engine.parts.runner.warm_up_in_pieces()
        for _ in range(FIRST_PIECES):
            next(pieces)
        heard.clear()
        engine.generate([[1, 2, 3]], params)
        assert heard == []
        engine.generate([[1, 2, 3], [4] * 40], params)
        assert heard  # other shapes are not there yet
        for _ in pieces:
            pass
        engine.warm_up()
        heard.clear()
        for routing in ("resident", "exact"):
            engine.generate([[1, 2, 3], [5] * 40, [6] * 60], params, routing=routing)
        assert heard == []


START = """
import sys
import jax
from emoe_jax import Engine
from emoe_jax.device.executables import cache_reads
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
few = {"max_model_len": 96, "max_num_seqs": 2, "max_num_batched_tokens": 64, "expert_memory": "3 slots"}
with Engine.load(sys.argv[1], **few) as engine, cache_reads() as reads:
    if sys.argv[2] == "later":
        for _ in engine.parts.runner.warm_up_in_pieces():
            pass
    engine.warm_up()
print(reads.asked, reads.asked - reads.found)
"""


def test_a_later_start_finds_piece_by_piece_what_a_whole_warm_up_has_compiled(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """A call that hands over an argument otherwise than it was compiled for would be another function to the cache."""

    def compiled(which: str) -> tuple[int, int]:
        command = [sys.executable, "-c", START, str(tiny_checkpoint), which]
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path)}
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=True)
        asked, missed = map(int, run.stdout.split())
        return asked, missed

    asked, missed = compiled("first")
    assert asked == missed > 40
    asked, missed = compiled("later")
    assert asked > 40
    assert missed == 0
