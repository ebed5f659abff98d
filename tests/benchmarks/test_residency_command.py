"""`python -m benchmarks.residency` from files to files."""

import json
from pathlib import Path

import pytest

from benchmarks.residency.__main__ import main
from benchmarks.residency.grid import NAMES, slots
from tests.traces.synthetic import make_trace


@pytest.fixture(scope="module")
def trace_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("traces") / "trace.npz"
    make_trace(prompts=12).save(path)
    return path


def test_every_policy_is_measured(trace_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out, plots = tmp_path / "out.json", tmp_path / "plots"
    main(
        [
            *("--trace", str(trace_file), "--concurrency", "1", "--json", str(out), "--plots", str(plots)),
            *("--expert-bytes", "1MB", "--link-bandwidth", "1GB"),
        ]
    )
    results = json.loads(out.read_text())
    assert list(results["replay"]) == NAMES
    assert results["setting"]["replayed_prompts"] == 3
    assert results["replay_concurrent"] == {"1": results["replay"]}
    for policy, cells in results["replay"].items():
        assert list(cells) == ["1", "0.75", "0.6", "0.5", "0.4", "0.3", "0.25", "0.2"]
        assert cells["1"]["coverage"] == cells["1"]["page_in_free_tokens"] == 1
        covered = [cell["coverage"] for cell in cells.values()]
        if policy in ("emoe", "lru", "oracle", "static-global"):
            assert covered == sorted(covered, reverse=True)
        for cell in cells.values():
            assert cell["substituted_weight"] == pytest.approx(1 - cell["coverage"], abs=1e-6)  # equal weights
            assert cell["stall_seconds_per_token"] == pytest.approx((1 - cell["coverage"]) * 3 * 2 * 1e-3)
            assert cell["bytes_moved_per_token"] == pytest.approx(cell["experts_moved_per_token_layer"] * 3 * 1e6)
    assert results["replay"]["emoe-paper"]["0.5"]["experts_moved_per_token_layer"] == 0  # 3 prompts, one forecast
    for policy in ("random", "static-global"):
        assert results["replay"][policy]["0.5"]["experts_moved_per_token_layer"] == 0
    assert results["replay"]["emoe"]["0.5"]["coverage"] > results["replay"]["random"]["0.5"]["coverage"]
    assert (plots / "residency_1.png").stat().st_size > 10_000
    assert "oracle" in capsys.readouterr().out


def test_slots_are_whole_and_at_least_top_k():
    assert [slots(share, 32, 4) for share in (1.0, 0.6, 0.3, 0.05)] == [32, 19, 9, 4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--trace", "missing.npz"], "missing.npz: no such trace file"),
        (["--predict-every", "0"], "--predict-every is 0; it must be at least 1"),
        (["--concurrency", "8", "0"], "--concurrency is 0; it must be at least 1"),
        (["--link-bandwidth", "0GB"], "--link-bandwidth is '0GB'; expected more than 0"),
        (["--link-bandwidth", "fast"], "'fast' is not an amount of bytes"),
        (["--predictor", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_line(options: list[str], message: str, trace_file: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        main(["--trace", str(trace_file), *options])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_traces_of_different_models_are_refused(trace_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    other = tmp_path / "other.npz"
    make_trace(prompts=4, experts=6).save(other)
    with pytest.raises(SystemExit):
        main(["--trace", str(trace_file), "--train-trace", str(other)])
    assert "3 MoE layers of 6 experts, top-2" in capsys.readouterr().err
