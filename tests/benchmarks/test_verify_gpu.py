"""The checks for a GPU run end to end without one, so that their first run on a card is not their first run."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks.verify_gpu import __main__ as verify_gpu
from benchmarks.verify_gpu import floors, kernels, models, steps
from emoe_jax.moe import moe_ffn


def test_a_dry_run_fills_every_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify_gpu.main(["--dry", "--json", str(tmp_path / "gpu.json")]) == 0
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert results["passes"]
    assert results["skipped"] == []
    assert {row["backend"] for row in results["kernels"]} == {"triton-interpreted", "gather"}
    assert all(row["waits_per_step"] == 1 for row in (each["decode_b2"] for each in results["models"]))
    assert any(row["decode_b2"]["loads_per_step"] > 0 for row in results["models"] if row["loads_run"])
    assert "everything passes" in capsys.readouterr().out


def test_a_model_is_gone_from_the_device_before_the_next_one() -> None:
    load, sizes = models.workloads(dry=True)[0], []
    before = sum(array.nbytes for array in jax.live_arrays())
    for _ in models.measure(load, 1 << 30, 1e9, 1e9, (1.0, 0.5)):
        sizes.append(sum(array.nbytes for array in jax.live_arrays()) - before)
    assert len(sizes) == 3
    assert max(sizes) < 10_000  # one has 150,000 bytes and more


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    prepared: list[int] = []
    monkeypatch.setattr(verify_gpu, "prepare_devices", prepared.append)  # before JAX starts its backend
    assert verify_gpu.main([]) == verify_gpu.NO_GPU
    assert "sees no GPU here" in capsys.readouterr().err
    assert prepared[0] > 0


def test_a_kernel_that_is_wrong_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*operands, backend, **statics):
        return moe_ffn(*operands, backend=backend, **statics) * (1 if backend == "reference" else 1.001)

    monkeypatch.setattr(kernels, "moe_ffn", wrong)
    found = kernels.check_experts(kernels.DRY_EXPERTS[0], "gather", "float32", 1e9, 1)
    assert not found["passes"]
    assert found["error"] == pytest.approx(1e-3, rel=0.05)


def test_a_step_that_is_wrong_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    run = steps._Side.run
    sides = []

    def wrong(self, batch):
        sides.append(self)
        logits, tokens = run(self, batch)
        return logits * (1 if self is sides[0] else np.float32(1.01)), tokens

    monkeypatch.setattr(steps._Side, "run", wrong)
    assert not steps.check_steps()["passes"]


def test_floors_of_mixtral_are_what_its_weights_weigh() -> None:
    """All experts of all layers at a large batch: 46.7 billion parameters, less the input embedding."""
    [row] = [row for row in floors.table((512,)) if row["model"] == "Mixtral-8x7B"]
    assert row["dense_gb"] + row["experts_gb"] == pytest.approx(2 * (46.7 - 0.13), rel=0.01)
    [alone] = [row for row in floors.table((1,)) if row["model"] == "Mixtral-8x7B"]
    assert alone["experts_gb"] == pytest.approx(row["experts_gb"] / 4, rel=1e-6)  # 2 of 8
