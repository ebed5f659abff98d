"""The reader of one safetensors file: what it returns, and what it refuses."""

import json
import re
import threading

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from emoe_jax.checkpoint.safetensors import SafetensorsFile
from emoe_jax.errors import CheckpointError


def write(path, header, data=b"", length=None):
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(encoded) if length is None else length
    path.write_bytes(length.to_bytes(8, "little") + encoded + data)
    return path


def entry(start, stop, dtype="F32", shape=(2,)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


@pytest.fixture
def file(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {
        "stack": rng.standard_normal((3, 5, 4)).astype(np.float32),
        "half": rng.standard_normal((6, 4)).astype(np.float16),
        "brain": rng.standard_normal((6, 4)).astype(jnp.bfloat16),
        "empty": np.zeros((0, 4), np.float32),
        "ids": np.arange(4),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    return SafetensorsFile(tmp_path / "a.safetensors"), tensors


@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
def test_reads_and_converts(file, dtype):
    opened, tensors = file
    for name in ("half", "brain"):
        np.testing.assert_array_equal(opened.tensor(name), tensors[name])
        out = np.empty((6, 4), dtype)
        opened.read_into(name, out)
        np.testing.assert_array_equal(out, tensors[name].astype(np.float32).astype(dtype))
    one = np.empty((4, 5), dtype)
    opened.read_into("stack", one, index=1, transposed=True)
    np.testing.assert_array_equal(one, tensors["stack"][1].T.astype(dtype))
    opened.read_into("empty", np.empty((0, 4), dtype))


def test_reads_into_part_of_an_array(file):
    opened, tensors = file
    record = np.zeros(64, np.float32)
    opened.read_into("stack", record[10:30].reshape(5, 4), index=2)
    np.testing.assert_array_equal(record[10:30], tensors["stack"][2].ravel())
    assert not record[:10].any()
    assert not record[30:].any()


def test_views_are_read_only(file):
    with pytest.raises(ValueError, match="read-only"):
        file[0].tensor("stack")[0] = 0


def test_refuses_what_is_not_there(file):
    opened, _ = file
    with pytest.raises(CheckpointError, match="tensor nothing is missing"):
        opened.tensor("nothing")
    with pytest.raises(CheckpointError, match="ids is I64"):
        opened.tensor("ids")
    with pytest.raises(CheckpointError, match=re.escape("half has shape (6, 4); expected (4, 6)")):
        opened.read_into("half", np.empty((4, 6), np.float32))
    with pytest.raises(CheckpointError, match="slice 3"):
        opened.read_into("stack", np.empty((5, 4), np.float32), index=3)


def test_concurrent_reads(tmp_path):
    """Threads that drop each other's pages still read the right bytes."""
    stack = np.arange(64 * 1000, dtype=np.float32).reshape(64, 1000)  # a page holds the ends of two slices
    save_file({"stack": stack}, tmp_path / "a.safetensors")
    opened = SafetensorsFile(tmp_path / "a.safetensors")
    wrong = []

    def read(start):
        out = np.empty(1000, np.float32)
        for i in range(400):
            index = (start + i) % 64
            opened.read_into("stack", out, index=index)
            if not np.array_equal(out, stack[index]):
                wrong.append(index)

    threads = [threading.Thread(target=read, args=(i * 16,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def resident_bytes():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmRSS"))


def test_memory_does_not_grow_with_reads(tmp_path):
    slices, size = 64, 1 << 18  # 64 MiB in slices of 1 MiB
    with (tmp_path / "a.safetensors").open("wb") as out:
        header = json.dumps({"stack": entry(0, slices * size * 4, shape=(slices, size))}).encode()
        out.write(len(header).to_bytes(8, "little") + header)
        for i in range(slices):
            out.write(np.full(size, i, np.float32).tobytes())
    opened = SafetensorsFile(tmp_path / "a.safetensors")
    target = np.zeros(size, np.float32)
    opened.read_into("stack", target, index=0)
    before = resident_bytes()
    for i in range(slices):
        opened.read_into("stack", target, index=i)
        assert target[0] == i
    assert resident_bytes() - before < 8 << 20


BAD = {
    "empty file": (lambda p: p.write_bytes(b""), "0 bytes are too few"),
    "no header": (lambda p: p.write_bytes(b"\x10\0\0\0\0\0\0\0{}"), "16 bytes does not fit a file of 10 bytes"),
    "huge header length": (lambda p: write(p, {}, length=2**63), "over the format's limit"),
    "header of 200 MB": (lambda p: write(p, {}, length=200_000_000), "over the format's limit"),
    "not JSON": (lambda p: write(p, b"{not json"), "not valid JSON"),
    "not UTF-8": (lambda p: write(p, b"\xff\xfe{}"), "not valid JSON"),
    "nested without end": (lambda p: write(p, b"[" * 100_000), "not valid JSON"),
    "a list": (lambda p: write(p, []), "expected an object"),
    "name twice": (
        lambda p: write(p, b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"a":1}'),
        "'a' appears twice",
    ),
    "entry without shape": (lambda p: write(p, {"a": {"dtype": "F32", "data_offsets": [0, 8]}}), "tensor a: header"),
    "entry not an object": (lambda p: write(p, {"a": 3}), "tensor a: header entry"),
    "unknown dtype": (lambda p: write(p, {"a": entry(0, 8, dtype="F33")}, bytes(8)), "tensor a: unknown dtype 'F33'"),
    "dtype not a string": (lambda p: write(p, {"a": entry(0, 8) | {"dtype": []}}, bytes(8)), "tensor a: unknown dtype"),
    "negative size": (lambda p: write(p, {"a": entry(0, 8, shape=(-2,))}, bytes(8)), "tensor a: shape"),
    "fractional size": (lambda p: write(p, {"a": entry(0, 8, shape=(2.0,))}, bytes(8)), "tensor a: shape"),
    "boolean size": (lambda p: write(p, {"a": entry(0, 4, shape=(True,))}, bytes(4)), "tensor a: shape"),
    "overflowing shape": (
        lambda p: write(p, {"a": entry(0, 0, shape=(2**40, 2**40))}, b""),
        "does not take the 0 bytes",
    ),
    "offsets backwards": (lambda p: write(p, {"a": entry(8, 0)}, bytes(8)), "tensor a: data_offsets"),
    "negative offset": (lambda p: write(p, {"a": entry(-8, 0)}, bytes(8)), "tensor a: data_offsets"),
    "offsets beyond the file": (lambda p: write(p, {"a": entry(0, 8)}, bytes(6)), "beyond the file's"),
    "shape and span differ": (
        lambda p: write(p, {"a": entry(0, 8, shape=(3,))}, bytes(8)),
        "does not take the 8 bytes",
    ),
    "overlap": (lambda p: write(p, {"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)), "tensor b overlaps"),
    "same bytes twice": (lambda p: write(p, {"a": entry(0, 8), "b": entry(0, 8)}, bytes(8)), "tensor b overlaps"),
    "gap": (lambda p: write(p, {"a": entry(0, 8), "b": entry(12, 20)}, bytes(20)), "tensor b leaves a gap"),
    "bytes left over": (lambda p: write(p, {"a": entry(0, 8)}, bytes(9)), "1 bytes after the last tensor"),
    "a directory": (lambda p: p.mkdir(), "cannot be read"),
}


@pytest.mark.parametrize("case", BAD)
def test_refuses(case, tmp_path):
    make, message = BAD[case]
    path = tmp_path / "bad.safetensors"
    make(path)
    with pytest.raises(CheckpointError, match=re.escape(message)) as error:
        SafetensorsFile(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_refuses_every_truncation(file, tmp_path):
    content = file[0].path.read_bytes()
    for size in range(0, len(content), 7):
        (tmp_path / "cut.safetensors").write_bytes(content[:size])
        with pytest.raises(CheckpointError, match=r"cut\.safetensors"):
            SafetensorsFile(tmp_path / "cut.safetensors")


def test_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        SafetensorsFile(tmp_path / "none.safetensors")
