"""Where files are kept that can be made again."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """The project's part of the user's cache folder: `$XDG_CACHE_HOME/emoe-jax`, or `~/.cache/emoe-jax`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "emoe-jax"
