"""The word lists and wordings of the generators, which lie as JSON in the folder `data`.

Their order matters: an example draws from a list by position, so a changed list changes what a seed generates.
"""

from __future__ import annotations

import importlib.resources
import json
from typing import Any


def read(name: str) -> Any:
    """What `data/<name>.json` holds, with tuples for its lists."""
    file = importlib.resources.files("train.tasks") / "data" / f"{name}.json"
    return _with_tuples(json.loads(file.read_text(encoding="utf-8")))


def _with_tuples(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(map(_with_tuples, value))
    if isinstance(value, dict):
        return {key: _with_tuples(part) for key, part in value.items()}
    return value
