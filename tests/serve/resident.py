"""How much memory a process has."""

from pathlib import Path

import pytest

PAGE_BYTES = 4096
TOLERANCE = 20e6
"""Bytes within which memory counts as unchanged."""

needs_proc = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc here to read memory from")


def resident_bytes(process: int | str = "self") -> int:
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * PAGE_BYTES
