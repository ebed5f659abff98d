"""Everything that answers without generating: models, tokens, health, metrics, the engine's state."""

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from serve.answers import (
    DetokenizeResponse,
    HealthResponse,
    ModelCard,
    ModelList,
    TokenizeResponse,
)
from serve.http.body import JsonRoute
from serve.refusals import Unavailable
from serve.schema import DetokenizeRequest, TokenizeRequest
from serve.service import Service, until_disconnect
from serve.telemetry.metrics import CONTENT_TYPE
from serve.telemetry.snapshots import Snapshots
from serve.telemetry.state import EngineState, FleetState, ReplicaState

TEXT: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}


def model_routes(service: Service, snapshots: Snapshots) -> APIRouter:
    """A router with all of them. `snapshots` answer for the state and the metrics, `service` for the rest."""
    router = APIRouter(route_class=JsonRoute)

    def card(name: str) -> ModelCard:
        defaults = dict(service.sampling_defaults) or None
        return ModelCard(
            id=name,
            created=service.created,
            max_model_len=service.max_model_len,
            default_sampling_params=defaults,
            tasks=None if service.known_tasks is None else list(service.known_tasks),
        )

    @router.get("/v1/models", tags=["models"])
    async def list_models() -> ModelList:
        return ModelList(data=[card(name) for name in service.names])

    @router.get("/v1/models/{model:path}", tags=["models"])
    async def retrieve_model(model: str) -> ModelCard:
        service.check_model(model)
        return card(model)

    @router.post("/tokenize", tags=["tokens"])
    async def tokenize(body: TokenizeRequest, request: Request) -> TokenizeResponse:
        """Token ids of a text, or of a conversation under the chat template."""
        service.check_model(body.model)
        if body.messages is not None:
            messages = [message.to_template() for message in body.messages]
            encoding = service.text.chat(messages, **body.template_arguments(), must_fit=False)
        else:
            encoding = service.text.encode(body.prompt or "", body.add_special_tokens)
        tokens = await until_disconnect(request, encoding)
        strings = [service.text.token_text(token) for token in tokens] if body.return_token_strs else None
        return TokenizeResponse(
            count=len(tokens), max_model_len=service.max_model_len, tokens=tokens, token_strs=strings
        )

    @router.post("/detokenize", tags=["tokens"])
    async def detokenize(body: DetokenizeRequest, request: Request) -> DetokenizeResponse:
        service.check_model(body.model)
        return DetokenizeResponse(prompt=await until_disconnect(request, service.text.decode(body.tokens, "tokens")))

    @router.get("/v1/health", tags=["server"])
    @router.get("/health", tags=["server"])
    async def health() -> HealthResponse:
        """200 while the engine works, 503 when its thread has ended, a step hangs, or steps have just failed."""
        if not service.worker.healthy:
            raise Unavailable(service.worker.hang or "the engine is not healthy")
        return HealthResponse()

    @router.get("/ready", tags=["server"])
    async def ready() -> HealthResponse:
        """200 while requests are taken; 503 while the model loads, while the server shuts down, and in trouble."""
        if not service.worker.ready:
            raise Unavailable(service.worker.hang or "the server is not ready: it shuts down, or its last steps failed")
        return HealthResponse()

    @router.get("/metrics", tags=["server"], response_class=Response, responses=TEXT)
    async def read_metrics() -> Response:
        """Prometheus metrics: vLLM's names under `emoe:`, and those of experts and process. No engine, none of it.

        At most 0.25 s old, and never older than the last request that ended.
        """
        return Response(await snapshots.metrics_text(), media_type=CONTENT_TYPE)

    @router.get("/v1/emoe/state", tags=["server"], response_model=EngineState)
    async def state() -> Response:
        """Residency, coverage, loads and scheduler of the engine, taken between two steps.

        At most 0.25 s old, and never older than the last request that came or ended.
        """
        return Response(await snapshots.state_json(), media_type="application/json")

    @router.get("/v1/emoe/replicas", tags=["server"])
    async def replicas(request: Request) -> FleetState:
        """What each replica published last, and its unfinished requests. Empty of a single server."""
        known = getattr(request.state, "fleet", ())
        return FleetState(replicas=[ReplicaState.model_validate(replica) for replica in known])

    return router
