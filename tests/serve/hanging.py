"""`serve.main` with an engine whose steps never end."""

import sys
import threading

from emoe_jax import Engine
from emoe_jax.requests.request import Delta
from serve.main import main


def hang(self: Engine) -> list[Delta]:
    """In place of `Engine.step`."""
    print("the step hangs", flush=True)
    threading.Event().wait()
    return []


if __name__ == "__main__":
    Engine.step = hang
    sys.exit(main())
