"""One open `.safetensors` file: a strictly checked header, and slices read straight to where they belong.

Nothing is mapped into memory: a file that shrinks would end the process with SIGBUS at the next touch of its map. One
`preadv` into the target reads 14 GB per second of CPU time from the page cache, where a map reached 16.
"""

import dataclasses
import json
import math
import os
import threading
import weakref
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from emoe_jax.errors import CheckpointError
from emoe_jax.experts.blocks import FP8

_MAX_HEADER = 100_000_000  # bytes; the format's own limit
_CHUNK = 1 << 20
"""Bytes that are held beside the target where it cannot be read into: below this, calls cost as much as copies."""
_FINITE_CHUNK = 1 << 16
"""Numbers looked at in one go: few enough for the cache."""
_PANEL = 64

WEIGHT_DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(jnp.bfloat16)}

STORED_DTYPES = WEIGHT_DTYPES | {"I8": np.dtype(np.int8), "U8": np.dtype(np.uint8), "F8_E4M3": FP8}
"""Those of all tensors that can be read, quantised ones included."""

_BITS = {"BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4, "F64": 64, "C64": 64}
_BITS |= {f"{sign}{bits}": bits for sign in "IU" for bits in (8, 16, 32, 64)}
_BITS |= {name: 8 * dtype.itemsize for name, dtype in WEIGHT_DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: its dtype as the header spells it, its shape, and its bytes in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class SafetensorsFile:
    """An open file; safe to read from several threads. Closed when nothing refers to it any more.

    A file that was changed since it was opened is refused at the next read, whether it became shorter or other bytes.
    One that was replaced (renamed over, as downloads and `save_checkpoint` do) goes on as it was.
    """

    def __init__(self, path: str | Path):
        """Open `path`. Raises `CheckpointError` when it is missing, truncated or its header does not add up."""
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                self._stamp = _stamp(file.fileno())
                self.tensors = _read_header(self.path, file, self._stamp[0])
                self._fd = os.dup(file.fileno())
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read: {error.strerror or error}") from None
        weakref.finalize(self, os.close, self._fd)

    def dtype(self, name: str) -> np.dtype:
        """That of a tensor that can be read. Raises `CheckpointError` for others."""
        return STORED_DTYPES[self._weight(name).dtype]

    def tensor(self, name: str) -> np.ndarray:
        """A read-only copy of a tensor, in the dtype of the file."""
        info = self._weight(name)
        out = np.empty(info.shape, STORED_DTYPES[info.dtype])
        self._fill(name, info.start, out)
        out.flags.writeable = False
        return out

    def read_into(
        self, name: str, out: np.ndarray, index: int | None = None, transposed: bool = False, turns: int = 1
    ) -> None:
        """Read a tensor (its slice `index` of axis 0; transposed) into `out`, converting to `out`'s dtype.

        `turns` is how many equal parts of the rows of `out` are stored in turn: a row of the first, one of the second.
        Raises `CheckpointError` when the shapes differ, and when the file was changed since it was opened; what is in
        `out` then is undefined. Holds at most a few MiB beside `out`.
        """
        info = self._weight(name)
        shape, dtype, start = info.shape, STORED_DTYPES[info.dtype], info.start
        if index is not None:
            if not 0 <= index < shape[0]:
                raise CheckpointError(f"{self.path}: {name} has {shape[0]} slices; slice {index} was asked for")
            shape = shape[1:]
            start += index * math.prod(shape) * dtype.itemsize
        wanted = shape[::-1] if transposed else shape
        if wanted != out.shape:
            raise CheckpointError(f"{self.path}: {name} has shape {wanted}; expected {out.shape}")
        if not out.size:
            return
        if out.shape[0] % turns:
            raise CheckpointError(f"{self.path}: {name} has {out.shape[0]} rows; expected a multiple of {turns}")
        if not transposed and turns == 1 and out.dtype == dtype and out.flags.c_contiguous:
            self._fill(name, start, out)
            return
        row_bytes = math.prod(shape[1:]) * dtype.itemsize
        rows = min(max(_PANEL, 4 * _CHUNK // row_bytes // _PANEL * _PANEL), shape[0])
        chunk = _scratch(rows * row_bytes).view(dtype).reshape(rows, *shape[1:])
        for first in range(0, shape[0], rows):
            part = chunk[: shape[0] - first]
            self._fill(name, start + first * row_bytes, part)
            for turn, target in enumerate(np.split(out, turns)):
                if transposed:
                    _copy_transposed(part[:, turn::turns], target[:, first : first + rows])
                else:
                    at = first // turns
                    np.copyto(target[at : at + rows // turns], part[turn::turns], casting="unsafe")

    def same_bytes(self, name: str, other: "SafetensorsFile", other_name: str) -> bool:
        """Whether two tensors agree in dtype, shape and every bit. Raises `CheckpointError` like `read_into`."""
        mine, theirs = self.tensors[name], other.tensors[other_name]
        if (mine.dtype, mine.shape) != (theirs.dtype, theirs.shape):
            return False
        buffers = np.empty((2, _CHUNK), np.uint8)
        for offset in range(0, mine.stop - mine.start, _CHUNK):
            a, b = buffers[:, : mine.stop - mine.start - offset]
            self._fill(name, mine.start + offset, a)
            other._fill(other_name, theirs.start + offset, b)
            if not np.array_equal(a, b):
                return False
        return True

    def _fill(self, name: str, start: int, out: np.ndarray) -> None:
        """Read the bytes of a contiguous array from position `start`, which is in tensor `name`."""
        target = out.reshape(-1).view(np.uint8).data
        done = 0
        try:
            while done < len(target):
                count = os.preadv(self._fd, [target[done:]], start + done)
                if not count:
                    break
                done += count
            stamp = _stamp(self._fd)
        except OSError as error:
            raise CheckpointError(f"{self.path}: tensor {name} cannot be read: {error.strerror or error}") from None
        if done < len(target):
            raise CheckpointError(
                f"{self.path}: tensor {name} ends after {done} of {len(target)} bytes; the file had "
                f"{self._stamp[0]} bytes when it was opened and has {stamp[0]} now"
            )
        if stamp != self._stamp:
            raise CheckpointError(
                f"{self.path}: the file was changed after it was opened ({self._stamp[0]} bytes then, {stamp[0]} now), "
                f"so tensor {name} cannot be trusted; restore the file and restart"
            )

    def _weight(self, name: str) -> TensorInfo:
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(f"{self.path}: tensor {name} is missing")
        if info.dtype not in STORED_DTYPES:
            known = ", ".join(STORED_DTYPES)
            raise CheckpointError(f"{self.path}: tensor {name} is {info.dtype}; weights must be one of {known}")
        return info


def are_finite(numbers: np.ndarray) -> bool:
    """Whether no number of a contiguous float32, float16 or bfloat16 array is infinite or NaN, by its exponent's bits.

    Some 20 GB/s, a few times as fast as `np.isfinite` on half precision.
    """
    bits = numbers.reshape(-1).view(np.dtype(f"u{numbers.itemsize}"))
    limit = np.asarray(np.inf, numbers.dtype).view(bits.dtype)[()]
    magnitude = bits.dtype.type((1 << (8 * numbers.itemsize - 1)) - 1)  # all bits but the sign
    for first in range(0, len(bits), _FINITE_CHUNK):
        if (bits[first : first + _FINITE_CHUNK] & magnitude).max() >= limit:
            return False
    return True


_threads = threading.local()


def _scratch(size: int) -> np.ndarray:
    """`size` bytes that belong to this thread until its next call."""
    buffer = getattr(_threads, "buffer", None)
    if buffer is None or len(buffer) < size:
        buffer = _threads.buffer = np.empty(size, np.uint8)
    return buffer[:size]


def _stamp(fd: int) -> tuple[int, int]:
    """What tells a changed file from one that is as it was: bytes, and time of the last write in nanoseconds."""
    status = os.fstat(fd)
    return status.st_size, status.st_mtime_ns


def _copy_transposed(source: np.ndarray, out: np.ndarray) -> None:
    """Through panels that fit the cache: three times as fast as NumPy's own strides over a power of two."""
    for row in range(0, len(out), _PANEL):
        out[row : row + _PANEL] = source[:, row : row + _PANEL].astype(out.dtype, order="C").T


def _read_header(path: Path, file: Any, size: int) -> dict[str, TensorInfo]:
    """Check everything the format promises, before a byte of it is trusted."""
    if size < 8:
        raise CheckpointError(f"{path}: {size} bytes are too few for a safetensors file; truncated?")
    length = int.from_bytes(file.read(8), "little")
    if length > _MAX_HEADER:
        raise CheckpointError(f"{path}: header of {length} bytes is over the format's limit of {_MAX_HEADER}")
    if 8 + length > size:
        raise CheckpointError(f"{path}: header of {length} bytes does not fit a file of {size} bytes; truncated?")
    try:
        header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:  # JSON and UTF-8 errors are ValueErrors
        raise CheckpointError(f"{path}: header is not valid JSON: {error}") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: header is a JSON {type(header).__name__}; expected an object")
    header.pop("__metadata__", None)
    data = 8 + length
    tensors = {name: _entry(path, name, entry, data, size) for name, entry in header.items()}
    end = data
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if info.start != end:
            what = "overlaps the tensor before it" if info.start < end else "leaves a gap before it"
            raise CheckpointError(f"{path}: tensor {name} {what} (starts at {info.start}; expected {end})")
        end = info.stop
    if end != size:
        raise CheckpointError(f"{path}: {size - end} bytes after the last tensor belong to none")
    return tensors


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} appears twice")
    return unique


def _entry(path: Path, name: str, entry: Any, data: int, size: int) -> TensorInfo:
    """One tensor's line of the header; `data` is where the byte buffer starts."""
    where = f"{path}: tensor {name}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: header entry must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise CheckpointError(f"{where}: unknown dtype {dtype!r}")
    if not _is_sizes(shape):
        raise CheckpointError(f"{where}: shape {shape!r} is not a list of sizes")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where}: data_offsets {offsets!r} are not a range")
    start, stop = data + offsets[0], data + offsets[1]
    if stop > size:
        raise CheckpointError(f"{where}: ends at byte {stop}, beyond the file's {size} bytes; truncated?")
    if 8 * (stop - start) != math.prod(shape) * _BITS[dtype]:
        raise CheckpointError(f"{where}: {dtype}{shape} does not take the {stop - start} bytes of its data_offsets")
    return TensorInfo(dtype, tuple(shape), start, stop)


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 2**63 for v in value)
