"""`benchmarks.contracts`: the replay keeps the promise of the contract, the live run fills every column."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.contracts.__main__ import main
from benchmarks.contracts.account import PARTS
from benchmarks.contracts.replay import replay
from benchmarks.quality import served
from emoe_jax import Engine
from emoe_jax.traces import RoutingTrace
from tests.benchmarks.quality_samples import write_model
from tests.traces.synthetic import make_trace


@pytest.fixture(scope="module")
def trace() -> RoutingTrace:
    """Four choices of sixteen experts, of shares from a tenth to two fifths."""
    drawn = make_trace(experts=16, top_k=4)
    shares = np.asarray([0.4, 0.3, 0.2, 0.1], np.float16)
    return dataclasses.replace(drawn, probs=np.broadcast_to(shares, drawn.probs.shape))


def test_a_higher_tolerance_loads_less_and_substitutes_more(trace: RoutingTrace) -> None:
    rows = replay(trace, trace, 0.5, [0.0, 0.15, 0.25, 0.35, 1.0])
    loads, weights, free = (
        [row[name] for row in rows] for name in ("loads_per_token_layer", "substituted_weight", "free_tokens")
    )
    assert loads == sorted(loads, reverse=True)
    assert weights == sorted(weights)
    assert free == sorted(free)
    assert weights[0] == 0
    misses = (1 - rows[0]["coverage"]) * trace.top_k
    assert loads[0] == pytest.approx(misses)  # every miss is loaded


def test_first_choices_are_always_loaded(trace: RoutingTrace) -> None:
    [kept] = replay(trace, trace, 0.5, [1.0], sacred=trace.top_k)
    [none] = replay(trace, trace, 0.5, [0.0])
    assert kept == {**none, "tolerance": 1.0}


def test_exchanges_are_loads_that_raise_coverage(trace: RoutingTrace) -> None:
    [without] = replay(trace, trace, 0.5, [0.25])
    [few] = replay(trace, trace, 0.5, [0.25], exchange=10.0)
    [many] = replay(trace, trace, 0.5, [0.25], exchange=0.01)
    assert few == without
    assert many["loads_per_token_layer"] > many["breaches"]
    assert many["coverage"] > without["coverage"]
    assert many["substituted_weight"] < without["substituted_weight"]


def test_with_room_for_all_nothing_is_missed(trace: RoutingTrace) -> None:
    [row] = replay(trace, trace, 1.0, [0.0])
    assert (row["breaches"], row["coverage"], row["free_tokens"]) == (0, 1, 1)


def test_the_command_fills_every_row(tmp_path: Path, trace: RoutingTrace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "warm_up", lambda _: None)
    monkeypatch.setattr(served, "ANSWER_TOKENS", 6)
    model = write_model(tmp_path / "tiny")
    trace.save(tmp_path / "trace.npz")
    options = ["--batches", "1", "--tasks", "facts", "--prompts", "1", "--stretches", "1", "--tolerances", "0.5"]
    traced = ["--trace", str(tmp_path / "trace.npz"), "--json", str(tmp_path / "numbers.json")]
    assert main(["--model", str(model), *options, *traced]) == 0
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert [row["tolerance"] for row in numbers["replay"]["0.5"]] == [0, 0.5]
    exact, *bounded, resident = numbers["live"]
    assert (exact["contract"], resident["contract"]) == ("exact", "resident")
    assert [row["tolerance"] for row in bounded] == [0.5]
    assert exact["perplexity_ratio"] == pytest.approx(1, abs=1e-4)
    assert exact["similarity"] == 1
    assert exact["substituted_weight"] == 0 < resident["substituted_weight"]
    assert exact["loads_per_token"] > resident["loads_per_token"] == 0
    assert exact["loads_per_token"] >= bounded[0]["loads_per_token"]
    assert all(row["tokens_per_s"] > 0 for row in numbers["live"])
    for row in numbers["live"]:
        account = row["account"]
        assert sum(account[part]["ms"] for part in PARTS) == pytest.approx(account["ms_per_step"])
        assert account["policy"]["calls"] > account["loop"]["calls"] == 1
        assert (account["loads"]["calls"] > 0) == (row["loads_per_token"] > 0) == (account["routers"]["calls"] > 0)
    assert resident["account"]["whole"]["calls"] == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--no-live"], "--no-live needs a --trace"),
        (["--tolerances", "2"], "'2' is not a share from 0 to 1"),
        (["--shares", "0"], "'0' is not a share above 0"),
    ],
)
def test_wrong_arguments_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err
