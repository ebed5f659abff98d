"""Write a checkpoint once with its experts quantised.

    python -m emoe_jax.checkpoint.convert SRC DST --expert-format int8

The files of DST hold the bits that loading SRC with `--expert-format int8` makes. Each weight of an expert becomes a
tensor of the same name and shape in int8, and one more tensor, `NAME_scale`, in float32: a scale per output channel.
All other weights, and the files of tokenizer, predictor and task profile, are copied.
"""

import argparse
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

import numpy as np

from emoe_jax.checkpoint.checkpoint import Checkpoint
from emoe_jax.checkpoint.family import Part
from emoe_jax.checkpoint.files import CONFIG, INDEX, PICKLES
from emoe_jax.checkpoint.quantisation import KEY, quantization_config
from emoe_jax.checkpoint.safetensors import SafetensorsFile
from emoe_jax.checkpoint.save import MAX_SHARD_BYTES, Tensor, write_files
from emoe_jax.checkpoint.stored_format import stored_tensors
from emoe_jax.engine_config import ExpertFormat
from emoe_jax.errors import CheckpointError, EmoeError, one_line
from emoe_jax.models.loading import open_checkpoint


def main(argv: Sequence[str] | None = None) -> int:
    """The command. 2 is the exit status for bad input, with one line that says what is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m emoe_jax.checkpoint.convert", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("source", metavar="SRC", help="a checkpoint directory, or a hub id")
    parser.add_argument("target", metavar="DST", type=Path, help="a directory that is not there yet, or empty")
    formats = [name for name in get_args(ExpertFormat) if name != "auto"]
    parser.add_argument("--expert-format", required=True, choices=formats, help="how the experts are stored")
    options = parser.parse_args(argv)
    try:
        checkpoint = open_checkpoint(options.source)
        convert(checkpoint, options.target)
        before, after = (
            sum(file.stat().st_size for file in _weights(d)) for d in (checkpoint.directory, options.target)
        )
        print(
            f"{options.target}: experts in {options.expert_format}; {before / 1e6:.1f} MB became {after / 1e6:.1f} MB"
        )
    except (EmoeError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


def convert(checkpoint: Checkpoint, target: Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write the checkpoint with experts in int8 to `target`, holding one projection of one expert at a time.

    Raises `CheckpointError` where its experts are quantised already or have biases, where `target` has something in it,
    and for weights that are not finite.
    """
    if checkpoint.config.expert_format is not None:
        raise CheckpointError(
            f"{checkpoint.directory} has experts in {checkpoint.config.expert_format} already; expected floats. "
            "--expert-format int8 of the server makes int8 of them while loading"
        )
    if checkpoint.config.expert_bias:
        raise CheckpointError(
            f"{checkpoint.directory}: experts with biases ({checkpoint.config.family}) are not converted; expected "
            "--expert-format int8 of the server, which converts them while loading"
        )
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target} is there already; expected a directory that is not, or is empty")
    raw = checkpoint.raw_config | {KEY: quantization_config("int8")}
    write_files(target, _tensors(checkpoint), raw, max_shard_bytes)
    skipped = shutil.ignore_patterns("*.safetensors", INDEX, ".*", *(f"*{suffix}" for suffix in PICKLES))
    for path in checkpoint.directory.iterdir():
        if path.name == CONFIG or path.name in skipped(str(checkpoint.directory), [path.name]):
            continue
        if path.is_dir():
            shutil.copytree(path, target / path.name)
        else:
            shutil.copyfile(path, target / path.name)


def _tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """By name on disk; the scales of a tensor come behind it, and are made when it is written."""
    tensors = {name: _copy(file, name) for file, name in checkpoint.other_tensors}
    scales: dict[Part, np.ndarray] = {}
    for source in checkpoint.expert_sources:
        for part in source.parts:
            _, name = checkpoint.weights.located(part)
            stored = tensors.setdefault(name, Tensor(part.shape, np.dtype(np.int8), []))
            stored.pieces.append(_numbers(checkpoint, part, scales))
            scale_shape = stored_tensors(part, "int8")[1].part.shape
            scale = tensors.setdefault(f"{name}_scale", Tensor(scale_shape, np.dtype(np.float32), []))
            scale.pieces.append(lambda part=part: scales.pop(part))
    return tensors


def _copy(file: SafetensorsFile, name: str) -> Tensor:
    return Tensor(file.tensors[name].shape, file.dtype(name), [lambda: file.tensor(name)])


def _numbers(checkpoint: Checkpoint, part: Part, scales: dict[Part, np.ndarray]) -> Callable[[], np.ndarray]:
    """The numbers of a part as they are stored. Leaves its scales in `scales`."""

    def piece() -> np.ndarray:
        shape = part.shape if part.index is None else part.shape[1:]
        numbers = np.empty(shape[::-1] if part.transposed else shape, np.int8)
        scales[part] = np.empty(part.rows, np.float32)
        checkpoint.weights.read_int8(part, numbers, scales[part])
        return numbers.T if part.transposed else numbers

    return piece


def _weights(directory: Path) -> list[Path]:
    return list(directory.glob("*.safetensors"))


if __name__ == "__main__":
    sys.exit(main())
