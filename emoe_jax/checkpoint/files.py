"""Finding the files of a checkpoint: a directory or hub id, and the shards that its index names."""

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from emoe_jax.checkpoint.safetensors import SafetensorsFile
from emoe_jax.demo import MISSING, is_missing
from emoe_jax.errors import CheckpointError

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_HUB_FILES = [
    "*.json",
    "model*.safetensors",
    "*.txt",
    "*.jinja",
    "*.model",
]  # weights, configuration and tokenizer only


def locate(source: str | Path, revision: str | None = None) -> Path:
    """The checkpoint directory `source`, or the local snapshot of hub id `source` after downloading it."""
    directory = Path(source).expanduser()
    if is_missing(directory):
        raise CheckpointError(MISSING)
    if directory.is_dir():
        if revision is not None:
            raise CheckpointError(f"{directory} is a directory; a revision ({revision}) applies to hub ids only")
        return directory
    if directory.exists():
        raise CheckpointError(f"{directory} is a file; expected a Hugging Face checkpoint directory")
    if not isinstance(source, str) or not _HUB_ID.fullmatch(source):
        raise CheckpointError(f"{directory} does not exist; expected a Hugging Face checkpoint directory")
    return _download(source, revision)


def _download(hub_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download  # slow to import, and most runs are local

    return _fetched(hub_id, lambda: snapshot_download(hub_id, revision=revision, allow_patterns=_HUB_FILES))


def fetch_config(hub_id: str) -> Path:
    """The `config.json` of a model on the Hugging Face hub, or of its copy in the hub's cache, and no other file.

    Raises `CheckpointError`, one line, for an id that is none, and where the file cannot be fetched.
    """
    from huggingface_hub import hf_hub_download

    log = logging.getLogger("huggingface_hub")
    level = log.level
    log.setLevel(logging.ERROR)  # each try without a network is a warning of two lines; the error says it once
    try:
        return _fetched(hub_id, lambda: hf_hub_download(hub_id, CONFIG))
    finally:
        log.setLevel(level)


def is_hub_id(text: str) -> bool:
    """Whether a text has the form `owner/name` of a model on the hub. Names without an owner are not counted."""
    return "/" in text and _HUB_ID.fullmatch(text) is not None


def _fetched(hub_id: str, fetch: Callable[[], str]) -> Path:
    try:
        return Path(fetch())
    except (OSError, ValueError, RuntimeError) as error:  # hub and network errors derive from these
        # Their messages are paragraphs; the first says what happened, the others repeat it with advice.
        reason = str(error).strip().split("\n")[0].removeprefix("Got: ").rstrip(".")
        raise CheckpointError(
            f"{hub_id} is not a directory, and could not be fetched from the Hugging Face hub: {reason}"
        ) from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or a `CheckpointError` that names it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}; expected an object")
    return value


def open_weights(directory: Path) -> dict[str, SafetensorsFile]:
    """Open every shard and map each tensor name to the file that holds it."""
    if (directory / SINGLE).exists():
        file = SafetensorsFile(directory / SINGLE)
        return dict.fromkeys(file.tensors, file)
    if (directory / INDEX).exists():
        return _open_shards(directory, _weight_map(directory / INDEX))
    pickles = sorted(p.name for p in directory.iterdir() if p.suffix in PICKLES)
    if pickles:
        raise CheckpointError(
            f"{directory} holds its weights as {pickles[0]}; pickle files can run code and are never loaded, "
            f"convert them to safetensors"
        )
    packed = sorted(path.name for path in directory.glob("*.gguf"))
    if packed:
        raise CheckpointError(
            f"{directory} holds its weights as {packed[0]}; GGUF is not read, use the safetensors checkpoint that "
            "it was made from with --expert-format int8"
        )
    raise CheckpointError(f"{directory} has neither {SINGLE} nor {INDEX}")


def _weight_map(path: Path) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map")
    for tensor, name in weight_map.items():
        # Shards lie beside the index; anything else could reach outside the checkpoint.
        if not isinstance(name, str) or not name.endswith(".safetensors") or Path(name).name != name or "\\" in name:
            raise CheckpointError(f"{path}: tensor {tensor} is mapped to {name!r}; expected a .safetensors file name")
    return weight_map


def _open_shards(directory: Path, weight_map: dict[str, str]) -> dict[str, SafetensorsFile]:
    files: dict[str, SafetensorsFile] = {}
    for name in sorted(set(weight_map.values())):
        if not (directory / name).exists():
            raise CheckpointError(f"{directory / name} is missing; {INDEX} names it")
        files[name] = SafetensorsFile(directory / name)
    for tensor, name in weight_map.items():
        if tensor not in files[name].tensors:
            elsewhere = next((other for other, file in files.items() if tensor in file.tensors), None)
            hint = f"; it is in {elsewhere}" if elsewhere else ""
            raise CheckpointError(f"{directory / name}: tensor {tensor} is missing, though {INDEX} names it{hint}")
    for name, file in files.items():
        for tensor in file.tensors:
            if weight_map.get(tensor) != name:
                raise CheckpointError(f"{directory / name}: tensor {tensor} is not listed for this file by {INDEX}")
    return {tensor: files[name] for tensor, name in weight_map.items()}
