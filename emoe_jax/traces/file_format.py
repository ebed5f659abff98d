"""The arrays of a trace file: which there are, of which type and rank, read without trusting the file."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Wanted(NamedTuple):
    """What a trace file's array has to be: one of these dtypes, with `ndim` axes, and present unless `optional`."""

    kinds: tuple[str, ...]  # dtype names; "str" stands for any width
    ndim: int
    optional: bool = False


_INTEGERS = ("int16", "int32", "int64")
FORMAT = {
    "experts": Wanted(("uint8", "uint16"), 3),
    "probs": Wanted(("float16", "float32"), 3),
    "further_experts": Wanted(("uint8", "uint16"), 3, optional=True),
    "further_probs": Wanted(("float16", "float32"), 3, optional=True),
    "sample": Wanted(("int32", "int64"), 1),
    "token_pos": Wanted(("int32", "int64"), 1),
    "task": Wanted(_INTEGERS, 1),
    "task_names": Wanted(("str",), 1),
    "prompt_length": Wanted(("int32", "int64"), 1, optional=True),
    "prompt_embedding": Wanted(("float16", "float32"), 2, optional=True),
    "prompt_tokens": Wanted(("int32", "int64"), 1, optional=True),
    "num_experts": Wanted((*_INTEGERS, "uint8", "uint16"), 0),
    "top_k": Wanted((*_INTEGERS, "uint8", "uint16"), 0),
}


def read_arrays(path: Path) -> dict[str, np.ndarray] | str:
    """The file's arrays by name, or what is wrong with it in one line. Other arrays are ignored."""
    arrays: dict[str, np.ndarray] = {}
    name = "the archive"
    try:
        # NumPy leaves a damaged file open when it is given a path.
        with path.open("rb") as file:
            if not zipfile.is_zipfile(file):
                return f"{path} is no .npz file, or the end of it is missing"
            file.seek(0)
            archive = np.load(file, allow_pickle=False)
            missing = [n for n, wanted in FORMAT.items() if n not in archive.files and not wanted.optional]
            if missing:
                return f"{path} is no routing trace: it has no {', '.join(missing)}"
            for name in FORMAT:
                if name in archive.files:
                    arrays[name] = archive[name]
    except FileNotFoundError:
        return f"{path}: no such trace file"
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        return f"{path} cannot be read as a trace, {name} is damaged or truncated: {_one_line(error)}"
    for name, array in arrays.items():
        wanted = FORMAT[name]
        kind = "str" if array.dtype.kind == "U" else array.dtype.name
        if kind not in wanted.kinds:
            return f"{path}: {name} has dtype {kind}; it must be {' or '.join(wanted.kinds)}"
        if array.ndim != wanted.ndim:
            return f"{path}: {name} has {array.ndim} dimensions; it must have {wanted.ndim}"
    return arrays


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
