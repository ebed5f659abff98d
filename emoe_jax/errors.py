"""Errors a user can cause. Each message is one line that names what was wrong and what would be right."""


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
