"""Whether routing can be recorded to a file, found out before a model is loaded."""

import tempfile
from pathlib import Path

from emoe_jax.errors import ConfigError
from emoe_jax.traces.parts import parts_of


def check_trace_file(name: str | Path) -> None:
    """Raise `ConfigError` when `name` is no `.npz`, exists (unless its recording was cut off), or cannot be written."""
    path = Path(name)
    if path.suffix != ".npz":
        raise ConfigError(f"record_traces: {path} is no name for a trace; expected one that ends in .npz")
    if path.exists() and not (parts_of(path) / "header.json").exists():
        raise ConfigError(f"record_traces: {path} exists; choose another file or remove it")
    try:
        with tempfile.TemporaryFile(dir=path.absolute().parent):
            pass
    except OSError as error:
        raise ConfigError(f"record_traces: {path} cannot be written: {error.strerror}") from None
