"""What classes of parameters that callers give with a request have in common."""

from emoe_jax.errors import RequestError
from emoe_jax.option_fields import KnownNames


class Parameters(KnownNames):
    """Base of dataclasses whose fields are parameters of a request. Raises `RequestError` for an unknown name."""

    @classmethod
    def _unknown(cls, name: str, problem: str) -> RequestError:
        return RequestError(f"{cls.__name__} has no parameter {problem}", param=name)
