"""Why the engine does not answer a request: what an HTTP error is made of."""


class QueueFull(Exception):
    """Too many requests are waiting; try again later."""


class Unavailable(Exception):
    """The server is shutting down, or the engine's thread has ended or hangs."""


class EngineFailure(Exception):
    """The engine raised while computing; the message is fit for a client, the cause is in the log."""
