"""The arithmetic of predicted and measured times, without measuring any."""

import json
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import planning
from emoe_jax.models import config_from_hf
from emoe_jax.planning.roofline import Roofline
from emoe_jax.planning.targets import Target

MACHINE = Target("here", "cpu", 2**30, bandwidth=1e9, link=1e9, half_flops=1e9, float32_flops=1e10)


@pytest.mark.parametrize(
    ("few", "many", "expected"),
    [(1.0, 2.0, (0.5, 0.25)), (1.0, 1.0, (1.0, 0.0)), (1.0, 0.5, (1.0, 0.0)), (0.0, 4.0, (0.0, 1.0))],
)
def test_overhead_is_a_line_through_two_depths(few: float, many: float, expected: tuple[float, float]) -> None:
    assert planning.DEPTHS == (2, 6)
    assert planning.overhead(few, many) == expected


def test_predictions_are_those_of_the_roofline_with_the_overhead() -> None:
    config = config_from_hf(planning.TINY | {"num_hidden_layers": 3})
    plain = planning.predicted(config, MACHINE)
    slowed = planning.predicted(config, planning.with_overhead(MACHINE, config, fixed=0.1, per_layer=0.01))
    assert set(plain) == {"decode, batch 1", "decode, batch 8", "prompt of 256"}
    assert all(slowed[what] == pytest.approx(plain[what] + 0.13) for what in plain)
    work = Roofline(config, "float32", "float32", 4).decode(8, planning.PROMPT)
    assert plain["decode, batch 8"] == max(work.memory_bytes / 1e9, work.operations / 1e10)
    assert plain["decode, batch 1"] < plain["decode, batch 8"]


def test_the_command_compares_both_models(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Engines take twice what the bytes take, and 0.3 s per step and layer."""

    @contextmanager
    def engine_of(model: Path, *sizes: Any, **named: Any) -> Any:
        raw = json.loads((model / "config.json").read_text())
        yield SimpleNamespace(config=config_from_hf(raw))

    def write(path: Path, raw: dict[str, Any]) -> None:
        path.mkdir()
        (path / "config.json").write_text(json.dumps(raw))

    def decode_seconds(engine: Any, batch: int, seed: int) -> float:
        return planning.predicted(engine.config, MACHINE)[f"decode, batch {batch}"] + 0.3 * engine.config.num_layers

    monkeypatch.setattr(planning, "engine_of", engine_of)
    monkeypatch.setattr(planning, "write_random_checkpoint", write)
    monkeypatch.setattr(planning, "this_machine", lambda memory: MACHINE)
    monkeypatch.setattr(planning, "decode_seconds", decode_seconds)
    monkeypatch.setattr(planning, "prompt_seconds", lambda engine, tokens, seed: 10.0)
    assert planning.main(["--json", str(tmp_path / "out.json"), "--repetitions", "1"]) == 0
    numbers = json.loads((tmp_path / "out.json").read_text())
    assert numbers["rates"]["layer_ms"] == pytest.approx(300)
    assert numbers["rates"]["step_ms"] == pytest.approx(0, abs=1e-6)
    assert [(row["model"], row["what"]) for row in numbers["rows"]] == [
        (model, what) for model in ("demo", "430 M") for what in ("decode, batch 1", "decode, batch 8", "prompt of 256")
    ]
    for row in numbers["rows"]:
        if row["what"] == "prompt of 256":
            assert row["measured_ms"] == 10_000
            assert row["ratio"] == pytest.approx(row["predicted_ms"] / 10_000)
        else:
            assert row["ratio"] == pytest.approx(1)
    printed = capsys.readouterr().out
    assert "300 ms per layer beside" in printed
    assert "430 M" in printed
