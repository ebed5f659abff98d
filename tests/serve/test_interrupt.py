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


LAST_MOMENT = """
import os, signal
from serve.interrupt import end_at_once_on_signal, exit_on_signal
class Last:
    kill, process, signal = os.kill, os.getpid(), signal.{name}
    def __del__(self):
        self.kill(self.process, self.signal)
with exit_on_signal():
    pass
end_at_once_on_signal(7)
last = Last()  # deleted by the interpreter's own end, when Python's handlers are gone
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_does_not_kill_the_interpreter_in_its_last_moments(name: str) -> None:
    command = [sys.executable, "-c", LAST_MOMENT.format(name=name)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
