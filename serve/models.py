"""Everything that answers without generating: models, tokens, health, metrics, the engine's state."""

from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response

from serve.answers import (
    DetokenizeResponse,
    HealthResponse,
    ModelCard,
    ModelList,
    TokenizeResponse,
)
from serve.body import JsonRoute
from serve.engine_metrics import engine_families
from serve.metrics import CONTENT_TYPE, RequestMetrics, exposition
from serve.process_metrics import process_metrics
from serve.schema import DetokenizeRequest, TokenizeRequest
from serve.service import Service
from serve.state import EngineState
from serve.worker import Unavailable

TEXT: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}


def model_routes(service: Service, metrics: RequestMetrics) -> APIRouter:
    router = APIRouter(route_class=JsonRoute)
    process = process_metrics()

    def card(name: str) -> ModelCard:
        return ModelCard(id=name, created=service.created, max_model_len=service.max_model_len)

    @router.get("/v1/models", tags=["models"])
    async def list_models() -> ModelList:
        return ModelList(data=[card(name) for name in service.names])

    @router.get("/v1/models/{model:path}", tags=["models"])
    async def retrieve_model(model: str) -> ModelCard:
        service.check_model(model)
        return card(model)

    @router.post("/tokenize", tags=["tokens"])
    async def tokenize(body: TokenizeRequest) -> TokenizeResponse:
        """Token ids of a text, or of a conversation under the chat template."""
        service.check_model(body.model)
        if body.messages is not None:
            messages = [message.to_template() for message in body.messages]
            tokens = await service.text.chat(messages, body.add_generation_prompt)
        else:
            tokens = await service.text.encode(body.prompt or "", body.add_special_tokens)
        strings = [service.text.token_text(token) for token in tokens] if body.return_token_strs else None
        return TokenizeResponse(
            count=len(tokens), max_model_len=service.max_model_len, tokens=tokens, token_strs=strings
        )

    @router.post("/detokenize", tags=["tokens"])
    async def detokenize(body: DetokenizeRequest) -> DetokenizeResponse:
        service.check_model(body.model)
        return DetokenizeResponse(prompt=await service.text.decode(body.tokens, "tokens"))

    @router.get("/health", tags=["server"])
    async def health() -> HealthResponse:
        """200 while the engine works, 503 when its thread has ended or its last steps all failed."""
        if not service.worker.healthy:
            raise Unavailable("the engine is not healthy")
        return HealthResponse()

    @router.get("/metrics", tags=["server"], response_class=Response, responses=TEXT)
    async def read_metrics() -> Response:
        """Prometheus metrics: vLLM's names under `emoe:`, and those of experts and process. No engine, none of it."""
        try:
            state = await service.worker.call(lambda engine: engine.state())
        except Unavailable:
            state = {}
        name = service.names[0]
        families = [*metrics.families(name), *engine_families(state, name), *process.families(name)]
        return Response(exposition(families), media_type=CONTENT_TYPE)

    @router.get("/v1/emoe/state", tags=["server"], response_model=EngineState, response_model_exclude_unset=True)
    async def state() -> Any:
        """Residency, coverage, loads and scheduler of the engine, taken between two steps."""
        return await service.worker.call(lambda engine: engine.state())

    return router
