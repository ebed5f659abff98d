"""What `benchmarks.paper` keeps from run to run, and when it makes it anew."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.paper.cache import Cache, digest_of


def test_a_result_is_kept_until_what_it_was_made_from_changes(tmp_path: Path) -> None:
    source = tmp_path / "model"
    source.mkdir()
    (source / "weights").write_text("one")
    made: list[int] = []

    def value(cache: Cache, **parameters: int) -> Any:
        return cache.value("number", parameters, ["benchmarks/results.py"], lambda: made.append(1) or len(made)).value

    cache = Cache(tmp_path / "kept", [source])
    assert [value(cache, n=1), value(cache, n=1), value(cache, n=2)] == [1, 1, 2]
    assert value(Cache(tmp_path / "kept", [source]), n=1) == 1
    (source / "weights").write_text("two")
    digest_of.cache_clear()
    assert value(Cache(tmp_path / "kept", [source]), n=1) == 3
    other = cache.path("number", {"n": 1}, ["benchmarks/timing.py"], ".json")
    assert not other.exists()  # other code


def test_a_result_cannot_depend_on_code_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="benchmarks/nothing does not exist"):
        Cache(tmp_path, []).path("number", {}, ["benchmarks/nothing"], ".json")


def test_a_file_is_kept_with_its_seconds(tmp_path: Path) -> None:
    cache, made = Cache(tmp_path, []), []

    def make(path: Path) -> None:
        made.append(path)
        path.write_text("x")

    first, second = (cache.file("trace", {}, [], ".npz", make) for _ in range(2))
    assert (len(made), first) == (1, second)
    first.value.unlink()
    cache.file("trace", {}, [], ".npz", make)
    assert len(made) == 2
