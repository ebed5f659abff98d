"""The arithmetic of predicted and measured times, without measuring any."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import calibration, planning
from benchmarks.peers import MODEL
from emoe_jax.models import config_from_hf
from emoe_jax.planning.targets import DEVICE_COSTS
from tests.benchmarks.known_costs import COSTS, MACHINE

HOST = 1e-5


def test_rows_have_both_times_and_the_parts_of_the_predicted_one() -> None:
    target = calibration.with_costs(MACHINE, HOST, COSTS)
    works = calibration.works_of(config_from_hf(MODEL))
    rows = planning.compared("a model", works, target, dict.fromkeys(works, 0.1))
    for row, work in zip(rows, works.values(), strict=True):
        host = 1e3 * HOST if row["what"] == calibration.PROMPT_STEP else 0.0
        assert row["predicted_ms"] == pytest.approx(1e3 * work.seconds(target, "float32") + host)
        assert row["ratio"] == pytest.approx(row["predicted_ms"] / 100)
        parts = row["parts_ms"]
        assert parts.pop("host") == pytest.approx(1e3 * HOST)
        assert sum(parts.values()) + host == pytest.approx(row["predicted_ms"])
        assert set(parts) == {*DEVICE_COSTS, "memory_bytes"}


def test_the_command_predicts_both_models_from_shorter_ones(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Engines take what the costs say, and the checked models twice that."""
    run: list[tuple[int, int]] = []

    @contextmanager
    def engine_of(model: Path) -> Iterator[Any]:
        config = config_from_hf(json.loads((model / "config.json").read_text()))
        run.append((config.hidden_size, config.num_layers))
        yield SimpleNamespace(config=config)

    def write(path: Path, raw: dict[str, Any]) -> None:
        path.mkdir()
        (path / "config.json").write_text(json.dumps(raw))

    def measured(engine: Any, repetitions: int) -> dict[str, float]:
        exact = calibration.with_costs(MACHINE, HOST, COSTS)
        seconds = calibration.predicted(calibration.works_of(engine.config), exact)
        return dict.fromkeys(seconds, HOST) if engine.config.hidden_size == 32 else seconds

    def twice(engine: Any, repetitions: int) -> dict[str, float]:
        return {what: 2 * seconds for what, seconds in measured(engine, repetitions).items()}

    for module in (calibration, planning):
        monkeypatch.setattr(module, "engine_of", engine_of)
        monkeypatch.setattr(module, "write_random_checkpoint", write)
    monkeypatch.setattr(calibration, "measured", measured)
    monkeypatch.setattr(planning, "measured", twice)
    monkeypatch.setattr(planning, "this_machine", lambda memory: MACHINE)
    assert planning.main(["--json", str(tmp_path / "out.json"), "--repetitions", "1"]) == 0
    numbers = json.loads((tmp_path / "out.json").read_text())
    assert numbers["costs"]["host"] == HOST
    assert set(numbers["costs"]) == {"host", *COSTS}
    assert [(row["model"], row["what"]) for row in numbers["rows"]] == [
        (model, what) for model in ("demo", "430 M") for what in ("decode, batch 1", "decode, batch 8", "prompt of 256")
    ]
    for row in numbers["rows"]:
        assert row["ratio"] == pytest.approx(0.5, rel=0.02)
    assert run == [(32, 2), (128, 2), (128, 4), (1024, 1), (1024, 2), (128, 8), (1024, 4)]
    printed = capsys.readouterr().out
    assert "430 M" in printed
    assert "GB/s" in printed
