"""The bundled demo model is found from a checkout, and named where a wheel is all there is."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from emoe_jax import demo
from emoe_jax.checkpoint.files import locate
from emoe_jax.errors import CheckpointError

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages by themselves, as a wheel leaves them."""
    site = tmp_path_factory.mktemp("site")
    for package in ("emoe_jax", "serve"):
        shutil.copytree(ROOT / package, site / package, ignore=shutil.ignore_patterns("__pycache__"))
    return site


def run(installed: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(installed)}
    command = [sys.executable, "-P", *arguments]  # -P: the working directory is no place to import from
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


def test_a_wheel_names_the_missing_model_and_what_to_do(installed: Path, tmp_path: Path) -> None:
    ran = run(installed, tmp_path, "-m", "serve.emoe", "serve")
    assert (ran.returncode, ran.stdout) == (2, "")
    (line,) = ran.stderr.splitlines()
    assert line.startswith(f"error: there is no bundled demo model at {installed / 'checkpoints' / 'demo'}")
    assert line.endswith("start in a checkout, or name a model with --model")


def test_a_wheel_finds_the_model_of_a_checkout_that_it_starts_in(installed: Path) -> None:
    ran = run(installed, ROOT, "-c", "from serve.options import DEMO_MODEL; print(DEMO_MODEL)")
    assert ran.stdout == f"{ROOT / 'checkpoints' / 'demo'}\n", ran.stderr


def test_a_checkout_finds_its_own_model_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert demo.demo_model() == ROOT / "checkpoints" / "demo"
    assert not demo.is_missing(demo.demo_model())


def test_a_missing_demo_model_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_BESIDE_THE_CODE", tmp_path / "checkpoints" / "demo")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="there is no bundled demo model"):
        locate(str(demo.demo_model()))
    with pytest.raises(CheckpointError, match=f"{tmp_path}/other does not exist"):
        locate(tmp_path / "other")
