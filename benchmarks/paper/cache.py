"""Results kept from run to run, under what they were made from."""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from benchmarks.results import write_json

REPOSITORY = Path(__file__).resolve().parents[2]


class Kept(NamedTuple):
    """A result, and the seconds that it took when it was made."""

    value: Any
    seconds: float


class Cache:
    """A folder of results. A result is found again while its name, parameters, code, input files and version of JAX are
    the same."""

    def __init__(self, folder: Path, inputs: Sequence[Path]):
        """`inputs` are files and folders that results are made from."""
        self._folder = folder
        self._inputs = {path.name: digest_of(path) for path in inputs}

    def value(self, name: str, parameters: Mapping[str, Any], code: Sequence[str], make: Callable[[], Any]) -> Kept:
        """A JSON-able result. `code` names the folders and files of this repository that it depends on."""
        path = self.path(name, parameters, code, ".json")
        if path.exists():
            kept = json.loads(path.read_text())
            return Kept(kept["value"], kept["seconds"])
        began = time.monotonic()
        value = make()
        seconds = time.monotonic() - began
        self.keep(path, value, seconds)
        return Kept(json.loads(path.read_text())["value"], seconds)

    def file(
        self,
        name: str,
        parameters: Mapping[str, Any],
        code: Sequence[str],
        suffix: str,
        make: Callable[[Path], None],
    ) -> Kept:
        """A file that `make` writes; the value is its path."""
        path, note = (self.path(name, parameters, code, ending) for ending in (suffix, ".json"))
        if not (path.exists() and note.exists()):
            path.parent.mkdir(parents=True, exist_ok=True)
            began = time.monotonic()
            make(path)
            self.keep(note, path.name, time.monotonic() - began)
        return Kept(path, json.loads(note.read_text())["seconds"])

    @staticmethod
    def keep(path: Path, value: Any, seconds: float) -> None:
        """Write a result to where `path` said."""
        write_json({"value": value, "seconds": round(seconds, 2)}, path)

    def path(self, name: str, parameters: Mapping[str, Any], code: Sequence[str], suffix: str) -> Path:
        """Where such a result is kept, or will be."""
        told = {
            "parameters": parameters,
            "code": [digest_of(REPOSITORY / part) for part in code],
            "inputs": self._inputs,
            "jax": jax.__version__,
        }
        key = hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()
        return self._folder / f"{name}-{key[:16]}{suffix}"


@functools.cache
def digest_of(path: Path) -> str:
    """Of a file's bytes, or of all files below a folder but compiled ones. Raises `FileNotFoundError` for neither."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist, so that no result can depend on it")
    digest = hashlib.sha256()
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    for file in files:
        if file.is_file() and file.suffix != ".pyc":
            digest.update(str(file.relative_to(path)).encode() + b"\0")
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()
