"""`python -m benchmarks.transfers`, on the demo model and on scripted traces."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.transfers import __main__ as command
from benchmarks.transfers.active import active_shares
from benchmarks.transfers.measure import Settings, measure
from benchmarks.transfers.modes import MODES
from emoe_jax.errors import ConfigError
from emoe_jax.policies import POLICIES
from emoe_jax.traces import RoutingTrace
from serve.options import DEMO_MODEL

GBPS = 0.05


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict:
    path = tmp_path_factory.mktemp("transfers") / "transfers.json"
    options = ["--modes", "all", "pre-gated", "--batches", "2", "--repeats", "1", "--steps", "6"]
    assert command.main([*options, "--link-gbps", str(GBPS), "--json", str(path)]) == 0
    return json.loads(path.read_text())


def rows(measured: dict) -> dict[tuple[str, str], dict]:
    return {(row["mode"], row["link"]): row for row in measured["rows"]}


def test_every_mode_has_a_row_per_link(measured: dict) -> None:
    found = rows(measured)
    assert list(found) == [("all", "machine"), ("pre-gated", "machine"), ("pre-gated", "modelled")]
    everything = found["all", "machine"]
    assert everything["missed_share"] == everything["loads"] == everything["waited_seconds"] == 0
    for (mode, _), row in found.items():
        assert row["token_seconds"] > 0
        assert row["request_seconds"] == pytest.approx(row["prefill_seconds"] + 6 * row["token_seconds"])
        if mode != "all":
            assert row["expert_bytes"] == pytest.approx(0.4 * everything["expert_bytes"], rel=0.05)
            assert row["substituted"] == 0
            assert 0 < row["missed_share"] < 1
            assert row["waited_loads"] > 0


def test_the_modelled_links_time_is_really_waited(measured: dict) -> None:
    row = rows(measured)["pre-gated", "modelled"]
    assert row["moved_bytes"] > 0
    assert row["transfer_seconds"] == pytest.approx(row["moved_bytes"] / (1e9 * GBPS))
    assert row["request_seconds"] > 0.9 * row["transfer_seconds"]
    assert row["waited_seconds"] > 0.5 * row["transfer_seconds"]  # a layer of the demo computes for a fraction of that


def test_loads_ahead_are_accounted_for(measured: dict) -> None:
    found = rows(measured)
    assert found["all", "machine"]["spared_share"] is None
    ahead = found["pre-gated", "machine"]
    assert 0 < ahead["asked_share"] <= 1
    assert ahead["spared_share"] <= ahead["asked_share"]
    assert 0 <= ahead["useless_share"] < 1


def test_experts_active_grow_with_what_is_looked_at(measured: dict) -> None:
    active = measured["active"]["2"]
    assert 0 < active["per_step"] < active["per_prompt"] < active["over_all"] <= 1


def trace(experts: list, sample: list[int], positions: list[int], lengths: list[int]) -> RoutingTrace:
    chosen = np.array(experts, np.uint8)[:, None]  # one layer
    return RoutingTrace(
        chosen,
        np.full(chosen.shape, 0.5, np.float16),
        np.array(sample, np.int32),
        np.array(positions, np.int32),
        np.zeros(len(lengths), np.int16),
        ("qa",),
        8,
        prompt_length=np.array(lengths, np.int32),
    )


def test_active_shares_of_a_batch() -> None:
    """Two prompts of 2 and 1 tokens, of which two and three answer tokens are read: two steps have both."""
    experts = [[0, 1], [0, 2], [2, 3], [4, 5], [0, 1], [1, 3], [2, 4], [6, 7]]
    found = active_shares(trace(experts, [0, 0, 0, 0, 1, 1, 1, 1], [0, 1, 2, 3, 0, 1, 2, 3], [2, 1]))
    assert found["over_all"] == 1
    assert found["per_prompt"] == pytest.approx((6 + 7) / 2 / 8)
    assert found["per_step"] == pytest.approx((3 + 3) / 2 / 8)  # {2, 3, 1} and {4, 5, 2}


def test_modes_are_what_the_paper_compares() -> None:
    assert list(MODES) == ["all", "emoe", "emoe-e", "on-demand", "pre-gated", "infinity"]
    assert all(mode.policy in POLICIES for mode in MODES.values())
    assert MODES["all"].options(0.4)["expert_memory"] == "100%"
    assert MODES["emoe-e"].options(0.25) == {
        "expert_memory": "25%",
        "routing": "resident",
        "policy": "emoe",
        "predict_every": 1,
    }
    assert {name for name, mode in MODES.items() if mode.routing == "exact"} == {"on-demand", "pre-gated", "infinity"}


def test_an_unknown_mode_is_named() -> None:
    with pytest.raises(ConfigError, match="unknown mode 'lru'; expected some of all, emoe"):
        measure(Settings(str(DEMO_MODEL), modes=("lru",)))


def test_quick_sets_what_is_not_given() -> None:
    settings, path = command.parse(["--quick", "--steps", "4", "--batches", "2", "2"])
    assert settings == command.QUICK._replace(batches=(2,), steps=4)
    assert path is None
    assert command.parse([])[0].batches == (1, 2, 4, 8, 16, 32, 64)


@pytest.mark.parametrize(
    "options",
    [["--link-gbps", "0"], ["--link-gbps", "fast"], ["--batches", "0"], ["--modes", "lru"], ["--share", "2"],
     ["--repeats", "0"], ["--steps", "x"], ["--seed", "-1"]],
)  # fmt: skip
def test_bad_options_are_refused(options: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        command.main(options)
    assert caught.value.code == 2
    assert options[0] in capsys.readouterr().err


def test_a_model_that_is_not_there_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert command.main(["--model", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
