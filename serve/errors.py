"""Every answer that is not a success, in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

import logging
from collections.abc import Mapping
from typing import Literal, cast

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException as StarletteHTTPException

from emoe_jax.errors import CheckpointError, RequestError, SloUnattainable
from serve.refusals import EngineFailure, QueueFull, Unavailable
from serve.validation import describe_validation

log = logging.getLogger("serve")

RETRY_AFTER_SECONDS = 1


class ErrorBody(BaseModel):
    """`param` names the field that is at fault, `code` the kind of mistake for programs. Either may be null."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """The body of every 4xx and 5xx answer."""

    error: ErrorBody


class MessagesErrorBody(BaseModel):
    """Anthropic's: a kind of mistake, and what was wrong."""

    type: str
    message: str


class MessagesError(BaseModel):
    """The body of every 4xx and 5xx answer of `/v1/messages`, in Anthropic's shape."""

    type: Literal["error"] = "error"
    error: MessagesErrorBody


MESSAGES = "/v1/messages"
_MESSAGES_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    503: "overloaded_error",
}


class ApiError(HTTPException):
    """An HTTP error raised on purpose. Being an `HTTPException` it passes through FastAPI's body parsing unchanged."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(status_code=status, detail=message, headers=headers)
        self.param = param
        self.code = code


def describe(error: Exception) -> tuple[int, ErrorBody, Mapping[str, str] | None]:
    """Status, body and headers for any exception; unknown ones become a 500 that says nothing about their content."""
    match error:
        case ApiError():
            kind = "server_error" if error.status_code >= 500 else "invalid_request_error"
            body = ErrorBody(message=error.detail, type=kind, param=error.param, code=error.code)
            return error.status_code, body, error.headers
        case SloUnattainable():
            body = ErrorBody(message=str(error), type="server_error", param=error.param, code=error.code)
            return 503, body, {"retry-after": str(RETRY_AFTER_SECONDS)}
        case RequestError():
            body = ErrorBody(message=str(error), type="invalid_request_error", param=error.param, code=error.code)
            return 400, body, None
        case RequestValidationError():
            message, param = describe_validation(error.errors())
            return 400, ErrorBody(message=message, type="invalid_request_error", param=param), None
        case QueueFull():
            body = ErrorBody(message=str(error), type="server_error", code="queue_full")
            return 503, body, {"retry-after": str(RETRY_AFTER_SECONDS)}
        case Unavailable():
            body = ErrorBody(message=str(error), type="server_error", code="unavailable")
            return 503, body, {"retry-after": str(RETRY_AFTER_SECONDS)}
        case EngineFailure() | CheckpointError():  # what is wrong with the model is no secret
            return 500, ErrorBody(message=str(error), type="server_error", code="internal_error"), None
        case _:
            body = ErrorBody(message="internal server error", type="server_error", code="internal_error")
            return 500, body, None


def messages_error(status: int, body: ErrorBody) -> MessagesError:
    """An error in Anthropic's shape."""
    usual = "api_error" if status >= 500 else "invalid_request_error"
    return MessagesError(error=MessagesErrorBody(type=_MESSAGES_TYPES.get(status, usual), message=body.message))


def error_response(error: Exception, path: str = "") -> Response:
    """The answer for any exception: status, body and headers as `describe` has them, in the shape of the path's API."""
    status, body, headers = describe(error)
    is_messages = path == MESSAGES or path.startswith(f"{MESSAGES}/")
    answer = messages_error(status, body) if is_messages else ErrorResponse(error=body)
    return JSONResponse(answer.model_dump(), status_code=status, headers=headers)


def install_error_handlers(app: FastAPI) -> None:
    """Answer every known exception of the app's routes, unknown paths included, by `error_response`."""

    def on_known(request: Request, error: Exception) -> Response:
        return error_response(error, request.scope["path"])

    def on_http(request: Request, error: Exception) -> Response:
        path = request.scope["path"]
        if isinstance(error, ApiError):
            return error_response(error, path)
        error = cast(StarletteHTTPException, error)
        messages = {
            404: "no such path",
            405: f"{request.method} is not allowed on this path",
        }
        message = messages.get(error.status_code, str(error.detail))
        headers = dict(error.headers) if error.headers else None
        return error_response(ApiError(error.status_code, message, headers=headers), path)

    for kind in (
        RequestError,
        RequestValidationError,
        QueueFull,
        Unavailable,
        EngineFailure,
        CheckpointError,
    ):
        app.add_exception_handler(kind, on_known)
    app.add_exception_handler(StarletteHTTPException, on_http)
