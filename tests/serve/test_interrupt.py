"""Signals once a server has shut down. Those while a model loads are in `test_process.py`."""

import subprocess
import sys

import pytest

PROGRAM = """
import os, signal
from serve.interrupt import end_at_once_on_signal
end_at_once_on_signal(7)
os.kill(os.getpid(), signal.{name})
print("not reached")
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_the_end_of_a_closed_server_is_cut_short_without_a_word(name: str) -> None:
    command = [sys.executable, "-c", PROGRAM.format(name=name)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (7, "", "")
