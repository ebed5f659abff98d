"""Ending the process on Ctrl-C or SIGTERM while a model loads, and once a server has shut down."""

import atexit
import contextlib
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import NoReturn

log = logging.getLogger("serve")

SIGNALS = (signal.SIGINT, signal.SIGTERM)
INTERRUPTED = 130
"""The exit status of an interrupted start, as shells have it for Ctrl-C."""
LEFT_BEHIND = 1
"""The exit status of a server that could not wait for its last step."""
SHOW_CURSOR = "\x1b[?25h"


@contextlib.contextmanager
def exit_on_signal() -> Iterator[Callable[[], None]]:
    """Until it ends, or until the function that it yields is called, a signal ends the process within moments.

    Python runs signal handlers in the main thread, which the compiler may hold for long, and an exception would wait
    for the compiler's other threads. So a thread of its own hears of the signal and ends the process, without cleaning
    up: what loads holds nothing but memory.
    """
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    handlers = {number: signal.signal(number, _leave_to_watcher) for number in SIGNALS}
    wakeup_fd = signal.set_wakeup_fd(sender.fileno())
    watcher = threading.Thread(target=_watch, args=(receiver,), name="signal watcher", daemon=True)
    watcher.start()
    atexit.register(_ignore_signals)  # before libraries register theirs, so it is called after them

    def end() -> None:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup_fd)
        sender.close()  # which ends the watcher
        watcher.join()
        receiver.close()

    with contextlib.ExitStack() as stack:
        stack.callback(end)
        yield stack.close


def end_at_once_on_signal(status: int) -> None:
    """From now on a signal ends the process without a word, with this status: the engine is closed, and what libraries
    do at the end would be interrupted with a traceback.
    """
    for number in SIGNALS:
        signal.signal(number, lambda *_: os._exit(status))


def leave_at_once(message: str, status: int) -> NoReturn:
    """End the process with a line in the log, without waiting for any thread, as one may never end."""
    log.error("%s", message)
    logging.shutdown()
    sys.stdout.flush()
    os._exit(status)


def _ignore_signals() -> None:
    """Python's end takes handlers away, after which a signal would kill the process and be its exit status."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _leave_to_watcher(*_: object) -> None:
    """A handler must exist for the wake-up file descriptor to be written to."""


def _watch(receiver: socket.socket) -> None:
    while number := receiver.recv(1):
        if number[0] in SIGNALS:
            if sys.stderr.isatty():
                print(SHOW_CURSOR, file=sys.stderr, flush=True)  # the progress bar has hidden it
            os._exit(INTERRUPTED)
