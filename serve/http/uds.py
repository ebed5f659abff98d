"""Listening on a Unix domain socket."""

import contextlib
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

from emoe_jax.errors import ConfigError

MODE = 0o660
"""The server's user and group may connect: a proxy needs to be in that group."""


@contextlib.contextmanager
def bind_uds(name: str) -> Iterator[socket.socket]:
    """A listening socket at a path, which is removed at the end.

    Takes the place of a socket that a dead server has left. Raises `ConfigError` when anything else is there, or when
    the path cannot be used.
    """
    path = Path(name)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with listener:
        try:
            _remove_stale(path)
            mask = os.umask(0o777 & ~MODE)  # from the first moment on: no other user connects in between
            try:
                listener.bind(name)
            finally:
                os.umask(mask)
            listener.listen()
            inode = path.stat().st_ino
        except OSError as error:
            raise ConfigError(f"cannot listen on uds {name}: {error.strerror or error}") from None
        try:
            yield listener
        finally:
            with contextlib.suppress(FileNotFoundError):
                if path.lstat().st_ino == inode:  # not another server's by now
                    path.unlink()


def _remove_stale(path: Path) -> None:
    """Remove a socket on which no server listens. Raises `ConfigError` when another server does, or it is no socket."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"cannot listen on uds {path}: it exists and is no socket; remove it or choose another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except (TimeoutError, BlockingIOError):
            pass  # a server listens, and is busy
    raise ConfigError(f"cannot listen on uds {path}: another server listens there")
