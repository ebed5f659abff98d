"""`emoe bench kernels`: the whole way with interpreted kernels, the search by itself, and an engine that reads it."""

import dataclasses
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from benchmarks.bench import tuning
from emoe_jax import Engine
from emoe_jax.engine import loading
from emoe_jax.errors import EmoeError
from emoe_jax.moe import kernel_choice
from emoe_jax.moe.kernel_choice import KernelKey, save_choice
from emoe_jax.moe.kernel_config import DEFAULT_TABLE, KernelConfig
from serve import emoe
from tests.engines import EngineFactory
from tests.moe.cases import model


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield tmp_path
    monkeypatch.setattr(kernel_choice, "_IN_USE", {})


def test_without_a_gpu_there_is_nothing_to_choose(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert emoe.main(["bench", "kernels", "mixtral-8x7b"]) == 3
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("there is nothing to choose: ")
    assert not list(cache.iterdir())
    assert emoe.main(["bench", "kernels", "mixtral-8x8b"]) == 2
    assert "the nearest known one is 'mixtral-8x7b'" in capsys.readouterr().err


def test_a_dry_run_goes_the_whole_way(capsys: pytest.CaptureFixture[str]) -> None:
    assert emoe.main(["bench", "kernels", "gpt-oss-20b", "--dry", "--expert-format", "int8", "--json"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert (numbers["device"], numbers["expert_format"]) == ("interpreted", "int8")
    first, last = numbers["choices"]
    assert (first["rows_per_expert"], first["rows"], last["rows_per_expert"]) == (2, [1, 2], None)
    for row in numbers["choices"]:
        assert row["tried"] == 3
        assert row["failed"] == {}
        assert 0 < row["seconds"] <= row["default_seconds"]
    kept = json.loads(Path(numbers["file"]).read_text())
    assert kept["configs"] == [row["config"] for row in numbers["choices"]]
    assert kept["experts"]["ffn"] == "clamped_glu"


class TestSearch:
    START = DEFAULT_TABLE.configs[0]

    def trials(self, monkeypatch: pytest.MonkeyPatch, cost: dict[KernelConfig, float]) -> tuning.Trials:
        """Trials whose times are given; those of other sizes raise."""

        def time(trials: tuning.Trials, sizes: KernelConfig) -> float:
            if sizes not in cost:
                return float("inf")
            trials.taken[sizes] = cost[sizes]
            return cost[sizes]

        monkeypatch.setattr(tuning.Trials, "_time", time)
        return tuning.Trials(model(4, 2), "float32", [], tuning.Search())

    def test_the_fastest_of_what_is_reached_one_change_at_a_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        wide = dataclasses.replace(self.START, tile_in=128)
        best = dataclasses.replace(wide, warps=8)
        trials = self.trials(monkeypatch, {self.START: 3.0, wide: 2.0, best: 1.0})
        assert trials.search(self.START) == best
        assert trials.taken == {self.START: 3.0, wide: 2.0, best: 1.0}

    def test_sizes_that_do_not_work_are_passed_over(self, monkeypatch: pytest.MonkeyPatch) -> None:
        works = dataclasses.replace(self.START, depth=64)
        assert self.trials(monkeypatch, {works: 2.0}).search(self.START) == works
        with pytest.raises(EmoeError, match="no tile sizes work on this device"):
            self.trials(monkeypatch, {}).search(self.START)

    def test_wrong_numbers_and_errors_are_counted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        config = tuning.small(model(4, 2))
        experts = tuning.random_experts(config, "float32")
        case = tuning.case_of(config, "float32", experts, 3)
        trials = tuning.Trials(config, "float32", [case], tuning.DRY)
        answers = {16: 1.0, 32: 2.0}

        def run(operands, *, sizes: KernelConfig, **_) -> jax.Array:
            if sizes.tile_in == 64:
                raise RuntimeError("too much\nshared memory")
            return operands.rows * answers[sizes.tile_in]

        monkeypatch.setattr(tuning, "_run", run)
        sizes = [dataclasses.replace(self.START, tile_in=tile) for tile in (16, 32, 64)]
        assert [trials._time(one) < float("inf") for one in sizes] == [True, False, False]
        assert trials.failed == {"other numbers than the default sizes give": 1, "RuntimeError: too much": 1}


def test_an_engine_reads_the_choice_and_says_so(
    engine_of: EngineFactory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On a machine whose steps would be of Triton."""
    config = engine_of().config
    monkeypatch.setattr(loading, "default_platform", lambda: "cuda")
    assert loading.used_kernels(config, "float32", "float32") == "default"
    key = KernelKey.of(config, "float32", "float32")
    path = save_choice(key, jax.devices()[0].device_kind, DEFAULT_TABLE, None)
    assert loading.used_kernels(config, "float32", "float32") == path
    path.write_text("{}")
    with caplog.at_level(logging.WARNING):
        assert loading.used_kernels(config, "float32", "float32") == "default"
    assert len(caplog.records) == 1
    monkeypatch.undo()
    assert loading.used_kernels(config, "float32", "float32") is None
    assert engine_of().parts.kernels is None


def test_a_loaded_engine_has_looked_for_the_choice(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(loading, "used_kernels", lambda *given: asked.append(given[1:]) or "default")
    with Engine.load(tiny_checkpoint, max_num_seqs=2, expert_format="int8", policy="static") as engine:
        assert (asked, engine.parts.kernels) == ([("float32", "int8")], "default")
