"""Signals once a server has shut down. Those while a model loads are in `test_process.py`."""

import subprocess
import sys

import pytest

PROGRAM = """
import os, signal
from serve.interrupt import end_at_once_on_signal
end_at_once_on_signal()
os.kill(os.getpid(), signal.{name})
print("not reached")
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_what_comes_after_the_last_request_is_cut_short_without_a_word(name: str) -> None:
    command = [sys.executable, "-c", PROGRAM.format(name=name)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
