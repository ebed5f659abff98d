"""A checkpoint whose files change while it is open: a named error, never a signal, never other weights."""

import os
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from emoe_jax import Engine, SamplingParams
from emoe_jax.checkpoint.safetensors import SafetensorsFile, are_finite
from emoe_jax.errors import CheckpointError
from emoe_jax.experts.record_format import RecordFormat
from emoe_jax.models import open_checkpoint

RNG = np.random.default_rng(2)
TENSORS = {
    "first": RNG.standard_normal((3, 5, 4)).astype(np.float32),
    "large": RNG.standard_normal((300, 700)).astype(jnp.bfloat16),
    "last": RNG.standard_normal((40, 60)).astype(np.float16),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


def overwrite(path: Path, start: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(start)
        file.write(data)


def read(file: SafetensorsFile, name: str, dtype: type = np.float32, transposed: bool = False) -> np.ndarray:
    shape = TENSORS[name].shape
    out = np.empty(shape[::-1] if transposed else shape, dtype)
    file.read_into(name, out, transposed=transposed)
    return out


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
@pytest.mark.parametrize("name", ["large", "last"])
def test_reads_in_pieces(path: Path, name: str, dtype: type, transposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emoe_jax.checkpoint.safetensors._CHUNK", 1000)
    expected = TENSORS[name].astype(dtype)
    got = read(SafetensorsFile(path), name, dtype, transposed)
    np.testing.assert_array_equal(got, expected.T if transposed else expected)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("left", [0, 10, 0.3, 0.99])
def test_a_file_that_shrank_is_a_named_error(path: Path, left: float, transposed: bool) -> None:
    file, size = SafetensorsFile(path), path.stat().st_size
    os.truncate(path, int(left * size) if left < 1 else int(left))
    for name in ("large", "last"):
        with pytest.raises(CheckpointError, match=rf"a\.safetensors.*{name}") as caught:
            read(file, name, transposed=transposed)
        assert str(size) in str(caught.value)
        assert str(path.stat().st_size) in str(caught.value)
    with pytest.raises(CheckpointError, match="last"):
        file.tensor("last")
    with pytest.raises(CheckpointError, match="last"):
        file.same_bytes("last", file, "last")


def test_a_file_that_was_overwritten_is_a_named_error(path: Path) -> None:
    file, size = SafetensorsFile(path), path.stat().st_size
    overwrite(path, size - 100, b"\xff" * 100)
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    with pytest.raises(CheckpointError, match="changed after it was opened"):
        read(file, "first")


def test_a_file_that_grew_is_a_named_error(path: Path) -> None:
    file = SafetensorsFile(path)
    with path.open("ab") as more:
        more.write(b"more")
    with pytest.raises(CheckpointError, match="changed after it was opened"):
        read(file, "first")


@pytest.mark.parametrize("how", ["replaced", "deleted", "moved", "other mode"])
def test_a_file_that_was_replaced_goes_on(path: Path, how: str) -> None:
    file = SafetensorsFile(path)
    if how == "replaced":
        path.with_suffix(".new").write_bytes(b"something else")
        path.with_suffix(".new").replace(path)
    elif how == "deleted":
        path.unlink()
    elif how == "moved":
        path.rename(path.with_suffix(".old"))
    else:
        path.chmod(0o444)
    np.testing.assert_array_equal(read(file, "first"), TENSORS["first"])


def test_a_file_is_closed_with_its_last_user(path: Path) -> None:
    file = SafetensorsFile(path)
    opened = file._fd
    os.fstat(opened)
    del file
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(opened)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 70_000, 99_999])
def test_numbers_that_are_not_finite_are_seen(dtype: type, value: float, place: int) -> None:
    numbers = RNG.standard_normal(100_000).astype(dtype)
    numbers[:2] = jnp.finfo(dtype).max, jnp.finfo(dtype).tiny
    assert are_finite(numbers)
    numbers[place] = value
    assert not are_finite(numbers)


def copied(source: Path, target: Path) -> tuple[Path, Path]:
    """A copy of a checkpoint and its one shard that holds experts."""
    shutil.copytree(source, target)
    return target, next(target.glob("*.safetensors"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_that_are_not_finite_are_refused(tiny_checkpoint: Path, tmp_path: Path, dtype: str) -> None:
    """Overwritten with the same size, and the time of the last write put back: only the weights themselves tell."""
    directory, shard = copied(tiny_checkpoint, tmp_path / "copy")
    checkpoint = open_checkpoint(directory)
    record_format = RecordFormat.of(checkpoint.config, dtype)
    record = np.empty(record_format.size, record_format.dtype)
    checkpoint.read_expert(2, 7, record, record_format)
    status = shard.stat()
    header = int.from_bytes(shard.read_bytes()[:8], "little") + 8
    overwrite(shard, header, b"\xff" * (status.st_size - header))
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(CheckpointError, match=r"layers\.2.*experts\.7.*not finite"):
        checkpoint.read_expert(2, 7, record, record_format)


@pytest.mark.parametrize("damage", ["shrink", "overwrite"])
def test_the_engine_outlives_a_file_that_changes(tiny_checkpoint: Path, tmp_path: Path, damage: str) -> None:
    """`exact` needs what cannot be read; `resident` goes on with what is there, and so does `exact` once it can be."""
    directory, shard = copied(tiny_checkpoint, tmp_path / "copy")
    greedy = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
    with Engine.load(directory, expert_memory="2 slots", policy="static", host_memory=0, routing="resident") as engine:
        expected = engine.generate([1, 2, 3], greedy, routing="exact")[0].token_ids
        data, status = shard.read_bytes(), shard.stat()
        if damage == "shrink":
            os.truncate(shard, 1000)
        else:
            overwrite(shard, 5000, b"\xff" * (len(data) - 5000))
        with pytest.raises(CheckpointError, match=shard.name):
            engine.generate([1, 2, 3], greedy, routing="exact")
        assert len(engine.generate([1, 2, 3], greedy, routing="resident")[0].token_ids) == 6
        assert engine.state()["scheduler"]["pages_used"] == 0
        overwrite(shard, 0, data)
        os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert engine.generate([1, 2, 3], greedy, routing="exact")[0].token_ids == expected
