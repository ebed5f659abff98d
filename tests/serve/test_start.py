"""What a start tells of its parts, and how much of the warm-up it leaves for later."""

import gc
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from emoe_jax.device.executables import cache_reads
from emoe_jax.engine_config import EngineConfig
from serve.main import main
from serve.start import warm_up_first
from serve.start_clock import StartClock
from serve.warm_starts import WarmStart


def test_the_line_has_every_part_once_with_all_of_its_seconds() -> None:
    now = 100.0
    clock = StartClock(lambda: now, began=99.5)
    for part, seconds in (("weights", 2.0), ("experts", 1.0), ("weights", 0.5), ("weights", 0.25)):
        now += seconds
        clock.begin(part)
    now += 3.0
    assert clock.line() == "started in 7.2 s: imports 2.5, weights 4.2, experts 0.5"


def asked(found: bool) -> None:
    jax.monitoring.record_event("/jax/compilation_cache/compile_requests_use_cache")
    if found:
        jax.monitoring.record_event("/jax/compilation_cache/cache_hits")


def test_reads_of_the_cache_are_counted_within_only() -> None:
    asked(found=False)
    with cache_reads() as reads:
        assert not reads.all_found  # nothing was asked: perhaps there is no cache
        asked(found=True)
        assert reads.all_found
        asked(found=False)
        assert not reads.all_found
    asked(found=True)
    assert (reads.asked, reads.found) == (2, 1)


class StartingEngine:
    """Its pieces find these in the cache."""

    def __init__(self, *found: bool, lean: Any = None):
        self.done: list[str] = []
        self.memory = SimpleNamespace(lean=lean, measured=lambda workspace: f"measured: {workspace}")
        self.parts: Any = SimpleNamespace(runner=self)
        self._found = found

    def warm_up_in_pieces(self) -> Iterator[None]:
        for number, found in enumerate(self._found):
            asked(found)
            self.done.append(f"piece {number}")
            yield

    def warm_up(self) -> None:
        self.done.append("all")


class Noted:
    """What is known of earlier starts."""

    def __init__(self, workspace: int | None = 7):
        self.workspace = workspace

    def workspace_bytes(self) -> int | None:
        return self.workspace

    def forget(self) -> None:
        self.workspace = None


def started(engine: Any, noted: Any = None) -> tuple[Iterator[None] | None, list[tuple[int, int]]]:
    reports: list[tuple[int, int]] = []
    noted = noted or Noted()
    return warm_up_first(engine, noted, lambda stage, done, total: reports.append((done, total))), reports


def test_what_is_in_the_cache_is_left_for_later_but_the_first_pieces() -> None:
    engine = StartingEngine(True, True, True, False)
    noted = Noted()
    rest, reports = started(engine, noted)
    assert rest is not None
    assert engine.memory == "measured: 7"  # as when all of it was compiled
    assert engine.done == ["piece 0", "piece 1"]
    assert reports == [(1, 2), (2, 2)]
    assert [*rest] == [None, None]
    assert engine.done == ["piece 0", "piece 1", "piece 2", "piece 3", "all"]
    assert noted.workspace is None  # the last piece was not in the cache: the next start reads all before it serves


@pytest.mark.parametrize("engine", [StartingEngine(False, True), StartingEngine(True, False, True)])
def test_nothing_is_left_where_a_first_piece_had_to_be_compiled(engine: StartingEngine) -> None:
    rest, reports = started(engine)
    assert rest is None
    assert (2, 2) not in reports
    assert "all" not in engine.done  # the caller does all of it


def test_a_start_whose_rest_failed_is_not_taken_for_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, noted = StartingEngine(True, True, True), Noted()
    monkeypatch.setattr(engine, "warm_up", lambda: 1 / 0)
    rest, _ = started(engine, noted)
    assert rest is not None
    with pytest.raises(ZeroDivisionError):
        list(rest)
    assert noted.workspace is None


def test_nothing_is_left_where_no_start_was_warmed_up_whole() -> None:
    """An earlier one may have been ended early: its first pieces say nothing of the others."""
    engine = StartingEngine(True, True, True)
    assert started(engine, Noted(None)) == (None, [])
    assert engine.done == []


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Path]:
    """The folder of JAX's cache."""
    before = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "xla"))
    yield tmp_path / "xla"
    jax.config.update("jax_compilation_cache_dir", before)


def test_a_start_is_known_by_its_engine(cache: Path) -> None:
    engine: Any = SimpleNamespace(options=EngineConfig(), config="a model")
    assert WarmStart(engine).workspace_bytes() is None
    WarmStart(engine).note(12)
    assert WarmStart(engine).workspace_bytes() == 12
    assert len(list(cache.iterdir())) == 1
    others: list[Any] = [
        SimpleNamespace(options=EngineConfig(max_num_seqs=3), config="a model"),
        SimpleNamespace(options=EngineConfig(), config="another"),
    ]
    assert [WarmStart(other).workspace_bytes() for other in others] == [None, None]
    WarmStart(engine).forget()
    assert WarmStart(engine).workspace_bytes() is None


def test_nothing_is_left_where_memory_is_traded() -> None:
    engine = StartingEngine(True, True, lean="a split")
    assert started(engine) == (None, [])
    assert engine.done == []


def test_the_collector_is_at_work_again_after_a_start_that_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "/nowhere"]) == 2
    assert "/nowhere" in capsys.readouterr().err
    assert gc.isenabled()
