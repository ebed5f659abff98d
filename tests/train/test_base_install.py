"""What the environment of `make serve` can do, which has the base dependencies and no extra."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.figures import __main__ as figures
from benchmarks.memory import __main__ as memory
from benchmarks.residency import __main__ as residency
from benchmarks.serving import __main__ as serving
from emoe_jax.predictor import Predictor
from tests.traces.synthetic import make_trace
from train.demo import __main__ as demo
from train.predictor import __main__ as predictor
from train.sensitivity import __main__ as sensitivity

ROOT = Path(__file__).parents[2]

WITHOUT_EXTRAS = """
import importlib.metadata as metadata, re, runpy, sys

def closure(wanted):
    found, left = set(), [wanted]
    while left:
        name = re.sub("[-_.]+", "-", left.pop()).lower()
        if name not in found:
            found.add(name)
            try:
                needs = metadata.requires(name) or []
            except metadata.PackageNotFoundError:
                continue
            left += [re.match("[A-Za-z0-9._-]+", need)[0] for need in needs if "extra ==" not in need]
    return found

base = closure("emoe-jax")
extra = {
    module
    for module, owners in metadata.packages_distributions().items()
    if not any(re.sub("[-_.]+", "-", owner).lower() in base for owner in owners)
} - {"emoe_jax", "serve", "train", "benchmarks", "tests"}
assert {"matplotlib", "pytest"} <= extra and not {"jax", "numpy", "flax"} & extra

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in extra:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

import importlib.util
find_spec = importlib.util.find_spec

def find(name, package=None):
    return None if name.partition(".")[0] in extra else find_spec(name, package)

importlib.util.find_spec = find
sys.meta_path.insert(0, Hidden())
module, *sys.argv[1:] = sys.argv[1:]
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


def without_extras(*command: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m` with every package hidden that the base dependencies do not bring along."""
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTRAS, *command],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "trace.npz"
    make_trace(prompts=24).save(path)
    return path


def test_a_predictor_is_trained_without_extras(trace: Path, tmp_path: Path) -> None:
    small = ["--steps", "2", "--width", "8", "--members", "1"]
    ran = without_extras("train.predictor", "--traces", str(trace), "--out", str(tmp_path), *small)
    assert ran.returncode == 0, ran.stderr
    assert "no curves.png: the package matplotlib is missing: pip install 'emoe-jax[" in ran.stdout
    assert not (tmp_path / "curves.png").exists()
    assert len(Predictor.load(tmp_path).memory) == 24
    assert json.loads((tmp_path / "metrics.json").read_text())["prompts"] == 3


def test_a_plot_that_is_asked_for_names_the_missing_package_before_any_work(trace: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ran = without_extras("train.predictor", "--traces", str(trace), "--out", str(out), "--plots")
    assert (ran.returncode, out.exists()) == (2, False)
    assert ran.stderr.startswith("error: the package matplotlib is missing: pip install 'emoe-jax[")
    assert len(ran.stderr.splitlines()) == 1


@pytest.mark.parametrize("kind", ["french"])
def test_a_missing_data_set_is_named(kind: str, tmp_path: Path) -> None:
    ran = without_extras("train.traces", "--tasks", kind, "--per-task", "1", "--out", str(tmp_path / "trace.npz"))
    assert ran.returncode == 2
    assert "Traceback" not in ran.stderr
    assert "is missing: pip install 'emoe-jax[train]'" in ran.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (predictor, ["--traces", "TRACE", "--out", "NEW", "--plots"]),
        (sensitivity, ["--plots", "NEW"]),
        (demo, ["--out", "NEW", "--work", "NEW"]),
        (figures, ["--trace", "TRACE", "--plots", "NEW"]),
        (memory, ["--geometry", "mixtral-8x7b", "--plots", "NEW"]),
        (residency, ["--trace", "TRACE", "--plots", "NEW"]),
        (serving, ["--simulate", "--plot", "NEW"]),
    ],
    ids=lambda value: value.__name__ if hasattr(value, "__name__") else "",
)
def test_every_command_that_draws_asks_for_matplotlib_first(
    command: Any,
    arguments: list[str],
    trace: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    find_spec = importlib.util.find_spec

    def hidden(name: str, package: str | None = None) -> Any:
        return None if name == "matplotlib" else find_spec(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", hidden)
    named = {"TRACE": str(trace), "NEW": str(tmp_path / "new")}
    try:
        status = command.main([named.get(argument, argument) for argument in arguments])
    except SystemExit as ended:
        status = ended.code
    assert status == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: the package matplotlib is missing: pip install 'emoe-jax[")
    assert not (tmp_path / "new").exists()
