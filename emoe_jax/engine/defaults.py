"""What a checkpoint says of itself for requests that say nothing: sampling defaults, and a name."""

import re
from pathlib import Path
from typing import Any

from emoe_jax.checkpoint.files import read_json
from emoe_jax.errors import CheckpointError, RequestError
from emoe_jax.requests.request import SamplingParams

GENERATION_CONFIG = "generation_config.json"

_NAMES = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}
"""vLLM applies these, and not `do_sample`."""

_SNAPSHOT = re.compile(r"models--((?P<owner>[^/]+?)--)?(?P<name>[^/]+)/snapshots/[^/]+$")


def sampling_defaults(directory: Path, generation_config: str = "auto") -> dict[str, Any]:
    """Fields of `SamplingParams` that `generation_config.json` sets; none when `generation_config` is "none".

    Raises `CheckpointError` for a value that no request could ask for.
    """
    path = directory / GENERATION_CONFIG
    if generation_config == "none" or not path.exists():
        return {}
    raw = read_json(path)
    given = {ours: raw[theirs] for theirs, ours in _NAMES.items() if raw.get(theirs) is not None}
    try:
        SamplingParams(**given)
    except RequestError as error:
        raise CheckpointError(f"{path}: {error}; generation_config none ignores the file's sampling defaults") from None
    return given


def model_name(path: str | Path) -> str:
    """The last part of a path or hub id; of a snapshot in the hub's cache, the repository that it is of."""
    snapshot = _SNAPSHOT.search(Path(path).expanduser().absolute().as_posix())
    if snapshot is not None:
        return "/".join(filter(None, (snapshot["owner"], snapshot["name"])))
    return Path(path).name
