"""The FastAPI application: routes, error shapes, guard and the worker's lifetime."""

import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import Response

from serve.chat import chat_routes
from serve.completions import completion_routes
from serve.dashboard import dashboard_routes
from serve.errors import ErrorResponse, install_error_handlers
from serve.http.body import BodyReader
from serve.http.guard import OPEN_PATHS, Guard
from serve.http.hosts import ANY
from serve.http.observer import Observer
from serve.http.paths import Paths
from serve.messages.routes import messages_routes
from serve.models import model_routes
from serve.options import KEEP_ALIVE_SECONDS, MAX_STORED_RESPONSES
from serve.responses.routes import responses_routes
from serve.responses.store import ResponseStore
from serve.service import ClientGone, Service
from serve.telemetry.metrics import RequestMetrics
from serve.telemetry.snapshots import Snapshots
from serve.telemetry.tracing import Tracing

DESCRIPTION = "Mixture-of-Experts inference with a fixed number of experts on the device, behind OpenAI's API."
ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorResponse, "description": "The request is at fault; `param` names the field."},
    "5XX": {"model": ErrorResponse, "description": "Overloaded (503, with Retry-After) or failed."},
}


def create_app(
    service: Service,
    api_keys: Sequence[str] = (),
    allowed_origins: Sequence[str] = (),
    tracing: Tracing | None = None,
    *,
    hosts: Sequence[str] = (ANY,),
    read_timeout: float = 30.0,
    root_path: str = "",
    keep_alive: float = KEEP_ALIVE_SECONDS,
    max_stored_responses: int = MAX_STORED_RESPONSES,
) -> FastAPI:
    """`allowed_origins`: web pages whose scripts may call the server, from any of them with `*`; by default none.

    `hosts`: what Host headers may name. `read_timeout`: seconds for a request's body. `root_path`: where a proxy has
    the server's paths, which it may pass on with it or without. `keep_alive`: seconds that a stream may be silent.
    `max_stored_responses`: how many requests may go on from.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        try:
            yield
        finally:
            service.worker.stop()
            service.text.close()

    app = FastAPI(
        title="eMoE-JAX",
        description=DESCRIPTION,
        version="1",
        lifespan=lifespan,
        responses=ERRORS,
        redirect_slashes=False,  # a redirect would repeat what the Host header says
    )
    app.state.body_reader = BodyReader(read_timeout)
    app.state.keep_alive = keep_alive
    app.include_router(completion_routes(service))
    app.include_router(chat_routes(service))
    app.include_router(messages_routes(service))
    app.include_router(responses_routes(service, ResponseStore(max_stored_responses)))
    metrics = RequestMetrics()
    app.include_router(model_routes(service, Snapshots(service.worker, metrics, service.names[0])))
    app.include_router(dashboard_routes())
    install_error_handlers(app)

    @app.exception_handler(ClientGone)
    async def on_client_gone(_: Request, __: Exception) -> Response:
        return Response(status_code=499)  # the client is gone and reads nothing

    if api_keys:
        document_keys(app.openapi())
    app.add_middleware(Guard, api_keys=api_keys, hosts=hosts)
    app.add_middleware(Observer, metrics=metrics, tracing=tracing)
    if allowed_origins:  # outermost: a browser asks without a key whether it may send one
        app.add_middleware(
            CORSMiddleware,
            allow_origins=allowed_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    app.add_middleware(Paths, root_path=root_path)
    return app


def document_keys(schema: dict[str, Any]) -> None:
    """Have an OpenAPI schema say which operations need an API key, so that /docs asks for it and sends it along."""
    schema["components"]["securitySchemes"] = {
        "key": {"type": "http", "scheme": "bearer"},
        "header": {"type": "apiKey", "in": "header", "name": "x-api-key"},
    }
    schema["security"] = [{"key": []}, {"header": []}]
    for path in OPEN_PATHS & schema["paths"].keys():
        for operation in schema["paths"][path].values():
            operation["security"] = []
