"""Errors a user can cause. Each message is one line that names what was wrong and what would be right."""

import importlib.util


class EmoeError(Exception):
    """Base of every error that is the user's to fix; commands print it and exit with status 2."""


class CheckpointError(EmoeError):
    """A checkpoint file is missing, truncated, of the wrong shape or of a format that is not read."""


class ConfigError(EmoeError):
    """A model configuration or a command-line option asks for something that is not supported."""


class CapacityError(EmoeError):
    """A memory budget is too small for the model or larger than the device."""


class RequestError(EmoeError):
    """A request is invalid. `param` names the offending field, `code` is OpenAI's error code where one exists."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.param = param
        self.code = code


class SloUnattainable(RequestError):
    """A request insists on deadlines that cannot be kept now; it may be sent again later."""

    def __init__(self, message: str):
        super().__init__(message, param="slo", code="slo_unattainable")


def one_line(error: BaseException) -> str:
    """What a command prints of an error; of a missing package, how to get it."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"the package {error.name.partition('.')[0]} is missing: pip install 'emoe-jax[test]'"
    return " ".join(str(error).split()) or type(error).__name__


def require(package: str) -> None:
    """Raise `ModuleNotFoundError` now, where a package is only imported once the work is done."""
    if importlib.util.find_spec(package) is None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
