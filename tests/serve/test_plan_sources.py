"""`emoe plan` with a model from the hub, and with the coverage of a trace."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from emoe_jax.models import config_from_hf
from emoe_jax.planning import fit
from serve import emoe, planned
from serve.trace_coverage import covered_by
from tests.engines import TINY
from tests.traces.synthetic import make_trace

DEVICE = ("--device", "l4", "--expert-memory", "50%")


@pytest.fixture(autouse=True)
def steps_are_taken_as_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "step_bytes", lambda *arguments: 1 << 20)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(TINY))
    return path


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("traces") / "trace.npz"
    make_trace(prompts=12).save(path)
    return path


@pytest.fixture(scope="module")
def covered(trace: Path) -> Callable[[float], float]:
    return covered_by(str(trace), config_from_hf(TINY))


def planned_as_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, Any]:
    status = emoe.main(["plan", *arguments, *DEVICE, "--json"])
    return status, json.loads(capsys.readouterr().out)


def test_of_a_hub_id_only_the_config_is_fetched(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *given: asked.append(given) or str(config))
    status, plan = planned_as_json(capsys, "someone/Some-Model")
    assert (status, plan["model"]) == (0, "some-model")
    assert asked == [("someone/Some-Model", "config.json")]


def test_without_a_network_a_hub_id_is_one_line_that_says_what_works(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def hf_hub_download(*given: str) -> str:
        logging.getLogger("huggingface_hub").warning("Retrying in 1s [Retry 1/5].")
        raise huggingface_hub.errors.LocalEntryNotFoundError("Got: no route to host\n\nCheck your connection.")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    assert emoe.main(["plan", "someone/some-model", *DEVICE]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "could not be fetched from the Hugging Face hub: no route to host; without a network, give" in err
    assert "mixtral-8x7b" in err


def test_coverage_is_that_of_the_policy_on_the_trace(
    config: Path,
    covered: Callable[[float], float],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, worst = planned_as_json(capsys, str(config))
    assert worst["coverage"] == worst["resident_share"] == 0.5
    monkeypatch.setattr(planned, "covered_by", lambda trace, config: covered)
    monkeypatch.setenv("COLUMNS", "160")
    status, plan = planned_as_json(capsys, str(config), "--trace", "trace.npz")
    assert status == 0
    assert plan["coverage"] == covered(0.5) > 0.5
    assert plan["tpot_ms"] < worst["tpot_ms"]
    assert emoe.main(["plan", str(config), *DEVICE, "--trace", "trace.npz"]) == 0
    assert f"{covered(0.5):.1%} of the routers' choices, by the trace" in capsys.readouterr().out


def test_more_resident_experts_cover_more(covered: Callable[[float], float]) -> None:
    values = [covered(share) for share in (0.0, 0.25, 0.4, 0.5, 0.75, 1.0)]
    assert values == sorted(values)
    assert (values[0], values[-1]) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trace", "missing.npz"], "missing.npz: no such trace file"),
        (["--trace", "x.npz", "--coverage", "0.5"], "--trace and --coverage both say what is covered; give one of"),
    ],
)
def test_a_mistake_is_one_line(
    config: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert emoe.main(["plan", str(config), *DEVICE, *arguments]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err


def test_a_trace_of_another_model_names_both(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.npz"
    make_trace(prompts=4, layers=2).save(other)
    assert emoe.main(["plan", str(config), *DEVICE, "--trace", str(other)]) == 2
    err = capsys.readouterr().err
    assert "is of 2 MoE layers of 8 experts, top-2; the model has 3 MoE layers of 8 experts, top-2" in err
