"""Writing a checkpoint of any family: the inverse of what `Checkpoint` reads."""

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from flax import nnx

from emoe_jax.checkpoint.family import Family, Part
from emoe_jax.checkpoint.files import CONFIG, INDEX, SINGLE
from emoe_jax.checkpoint.safetensors import STORED_DTYPES
from emoe_jax.config import ModelConfig
from emoe_jax.experts.weights import ExpertWeights

Layout = Literal["per_expert", "fused"]

MAX_SHARD_BYTES = 2 << 30

_DTYPE_NAMES = {dtype: name for name, dtype in STORED_DTYPES.items()}


@dataclasses.dataclass
class Tensor:
    """A tensor to write: its shape, and its bytes as pieces that are made when their turn comes."""

    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: list[Callable[[], np.ndarray]]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in the file."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def write_checkpoint(
    directory: str | Path,
    family: Family,
    config: ModelConfig,
    raw_config: Mapping[str, Any],
    decoder_state: nnx.State,
    experts: Sequence[ExpertWeights],
    layout: Layout = "per_expert",
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write `config.json` and safetensors (sharded with an index above `max_shard_bytes`) in the arrays' own dtypes.

    `experts` holds all `E` experts of each MoE layer; it may be a lazy sequence, of which one layer at a time is held.
    `"fused"` writes `[E, ...]` stacks, the layout that transformers 5 saves unconverted (OpenMoE: that of the hub). A
    family that has nothing but stacks on the hub is written as there by `"per_expert"`.
    See `write_files`. Raises `ValueError` for quantised experts, which `convert` writes.
    """
    tensors = _dense_tensors(family, config, decoder_state) | _expert_tensors(family, config, experts, layout)
    write_files(directory, tensors, raw_config, max_shard_bytes)


def write_files(
    directory: str | Path,
    tensors: Mapping[str, Tensor],
    raw_config: Mapping[str, Any],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write `config.json` and these tensors, in their order, piece by piece.

    Files are written beside their place and moved into it, `config.json` last: a directory that has it is complete.
    A checkpoint that was there before is replaced; its tokenizer files stay.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".saving-", dir=directory))
    try:
        _write_weights(staging, tensors, max_shard_bytes)
        _write_json(staging / CONFIG, raw_config)
        _move_into_place(staging, directory)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _dense_tensors(family: Family, config: ModelConfig, state: nnx.State) -> dict[str, Tensor]:
    values = {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}
    tensors = {}
    bands: dict[str, list[tuple[Part, Callable[[], np.ndarray]]]] = {}
    for path, parts in family.dense_tensors(config).items():
        array = values[path].get_value()
        row = 0
        for part in parts:
            piece = _rows(lambda a=array: np.asarray(a), row, part)
            if part.band is not None:
                bands.setdefault(part.name, []).append((part, piece))
                piece = _joined(part, np.dtype(array.dtype), bands[part.name])
            tensors[part.name] = Tensor(part.shape, np.dtype(array.dtype), [piece])
            row += part.rows
    return tensors


def _joined(
    part: Part, dtype: np.dtype, bands: Sequence[tuple[Part, Callable[[], np.ndarray]]]
) -> Callable[[], np.ndarray]:
    """A tensor whose rows come from several arrays: `bands` has them all when the piece is made."""

    def piece() -> np.ndarray:
        whole = np.empty(part.shape, dtype)
        for of, rows in bands:
            assert of.band is not None
            target = of.band.of(whole)
            target[:] = rows().reshape(target.shape)
        return whole

    return piece


def _expert_tensors(
    family: Family, config: ModelConfig, experts: Sequence[ExpertWeights], layout: Layout
) -> dict[str, Tensor]:
    if len(experts) != len(config.moe_layers):
        raise ValueError(f"experts of {len(experts)} layers given; the model has {len(config.moe_layers)} MoE layers")
    if experts[0].in_scales is not None:
        raise ValueError("experts are quantised; emoe_jax.checkpoint.convert writes such a checkpoint")
    fetch = _LayerCache(experts)
    dtype = np.dtype(experts[0].w_in.dtype)
    tensors: dict[str, Tensor] = {}
    for m, layer in enumerate(config.moe_layers):
        for expert in range(config.num_experts):
            sources = family.expert_sources(config, layer, expert)
            separate = [s for s in sources if s.w_out.index is None]
            fused = [s for s in sources if s.w_out.index is not None]
            source = (separate or fused)[0] if layout == "per_expert" else fused[-1]
            for number, parts in enumerate(source.arrays):
                row = 0
                for part in parts:
                    piece = _rows(lambda m=m, n=number, e=expert: fetch(m)[n][e], row, part)
                    tensors.setdefault(part.name, Tensor(part.shape, dtype, [])).pieces.append(piece)
                    row += part.rows
    return tensors


class _LayerCache:
    """The layer being written, as NumPy arrays; tensors are written layer by layer."""

    def __init__(self, experts: Sequence[ExpertWeights]):
        self._experts = experts
        self._index = -1
        self._arrays: list[np.ndarray] = []

    def __call__(self, index: int) -> list[np.ndarray]:
        if index != self._index:
            layer = self._experts[index]
            arrays = (layer.w_in, layer.w_out, layer.b_in, layer.b_out)
            self._arrays = [np.asarray(array) for array in arrays if array is not None]
            self._index = index
        return self._arrays


def _rows(array: Callable[[], np.ndarray], row: int, part: Part) -> Callable[[], np.ndarray]:
    """The rows of `array()` that `part` stores, in the orientation in which it stores them."""

    def piece() -> np.ndarray:
        rows = array()[row : row + part.rows]
        if part.turns > 1:
            rows = rows.reshape(part.turns, -1, *rows.shape[1:]).swapaxes(0, 1).reshape(rows.shape)
        return rows.T if part.transposed else rows

    return piece


def _write_weights(directory: Path, tensors: Mapping[str, Tensor], max_shard_bytes: int) -> None:
    shards = list(_shards(tensors, max_shard_bytes))
    if len(shards) == 1:
        _write_file(directory / SINGLE, tensors)
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(directory / name, {n: tensors[n] for n in names})
        weight_map |= dict.fromkeys(names, name)
    total = sum(tensor.nbytes for tensor in tensors.values())
    _write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _shards(tensors: Mapping[str, Tensor], max_shard_bytes: int) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        if names and size + tensor.nbytes > max_shard_bytes:
            yield names
            names, size = [], 0
        names.append(name)
        size += tensor.nbytes
    yield names


def _write_file(path: Path, tensors: Mapping[str, Tensor]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses files that do not say so
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.nbytes
        dtype = _DTYPE_NAMES[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-(8 + len(encoded)) % 64)  # data starts aligned
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, tensor in tensors.items():
            start = file.tell()
            for piece in tensor.pieces:
                file.write(piece().tobytes())
            written = file.tell() - start
            if written != tensor.nbytes:
                raise ValueError(f"{name}: wrote {written} bytes; its shape {tensor.shape} takes {tensor.nbytes}")
        file.flush()
        os.fsync(file.fileno())


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _move_into_place(staging: Path, directory: Path) -> None:
    new = {path.name for path in staging.iterdir()}
    (directory / CONFIG).unlink(missing_ok=True)  # from here on the directory is no checkpoint until all has moved
    for old in [*directory.glob("model*.safetensors"), directory / INDEX]:
        if old.name not in new:
            old.unlink(missing_ok=True)
    for name in sorted(new - {CONFIG}):
        os.replace(staging / name, directory / name)
    os.replace(staging / CONFIG, directory / CONFIG)
