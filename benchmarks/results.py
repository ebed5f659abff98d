"""What a benchmark leaves behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_json(results: dict[str, Any], path: Path | None) -> None:
    """Whole or not at all, so that a run that is cut off leaves what it wrote before. None writes nothing."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(path.name + ".draft")
        draft.write_text(json.dumps(results, indent=1) + "\n")
        draft.replace(path)
