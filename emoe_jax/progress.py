"""How long work says how far it is."""

from collections.abc import Callable

Progress = Callable[[int, int], None]
"""Called with `(done, total)`: bytes of a file, executables of a warm-up."""
