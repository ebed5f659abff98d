"""POST /v1/responses: OpenAI's newer API over the same path as chat completions, and what is kept of its answers."""

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import Response
from pydantic import BeforeValidator

from emoe_jax.errors import RequestError
from serve.chat import begin_chat
from serve.errors import ApiError
from serve.http.body import JsonRoute
from serve.responses.answers import DeletedResponse, ItemList, ResponsesAnswer
from serve.responses.input import ITEMS, InputItem, with_ids
from serve.responses.schema import ResponsesRequest
from serve.responses.store import ResponseStore, StoredResponse
from serve.responses.writer import ResponsesWire, ResponsesWriter
from serve.schema import GatewayHeaders
from serve.service import Service, until_disconnect
from serve.stream import EventStream
from serve.validation import named

RESPONSES = "/v1/responses"
DEFAULT_ITEMS, MAX_ITEMS = 20, 100
"""Of one page."""

OWN_NAMES = {"messages": "input", "max_tokens": "max_output_tokens", "response_format": "text.format"}
"""What this API calls fields of chat completions."""

OR_EVENTS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer; with `stream` its pieces as named server-sent events.",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    }
}


def _limit(value: Any) -> Any:
    if not (isinstance(value, int) or (isinstance(value, str) and re.fullmatch("[0-9]{1,9}", value))) or not (
        1 <= int(value) <= MAX_ITEMS
    ):
        raise ValueError(f"is {named(value)}; expected an integer from 1 to {MAX_ITEMS}")
    return value


Limit = Annotated[int, Query(ge=1, le=MAX_ITEMS), BeforeValidator(_limit)]


def responses_routes(service: Service, store: ResponseStore) -> APIRouter:
    """A router with all of them, for this service."""
    router = APIRouter(route_class=JsonRoute, tags=["generation"])

    def stored(request: Request, response_id: str) -> StoredResponse:
        found = store.get(request.state.tenant, response_id)
        if found is None:
            raise ApiError(404, _unknown(response_id), param="response_id", code="response_not_found")
        return found

    @router.post(RESPONSES, response_model=ResponsesAnswer, responses=OR_EVENTS)
    async def create_response(
        body: ResponsesRequest, request: Request, headers: Annotated[GatewayHeaders, Header()]
    ) -> Response:
        """Answer a conversation, in OpenAI's newer API."""
        owner, earlier = request.state.tenant, list[InputItem]()
        if body.previous_response_id is not None:
            found = store.get(owner, body.previous_response_id)
            if found is None:
                message, code = _unknown(body.previous_response_id), "previous_response_not_found"
                raise RequestError(message, param="previous_response_id", code=code)
            earlier = found.conversation()
        try:
            chat = await begin_chat(service, body.to_chat(earlier), request, headers)
        except RequestError as error:
            raise in_own_names(error) from None

        def keep(answer: ResponsesAnswer) -> None:
            if answer.store:
                items = ITEMS.dump_json(with_ids([*earlier, *body.input]), exclude_none=True)
                store.add(owner, answer.id, StoredResponse(answer.model_dump_json().encode(), items))

        writer = ResponsesWriter(service, body, chat, keep)
        if body.stream:
            return EventStream(chat.generation, writer, wire=ResponsesWire(writer))
        try:
            answer = await until_disconnect(request, writer.read())
        finally:
            chat.generation.abort()
        return _json(answer.model_dump_json().encode())

    @router.get(f"{RESPONSES}/{{response_id}}", response_model=ResponsesAnswer)
    async def retrieve_response(response_id: str, request: Request, stream: bool = False) -> Response:
        """A response that is kept, as it was answered."""
        found = stored(request, response_id)
        if stream:
            message = "a response that is kept has ended, so it is not streamed; leave out stream"
            raise RequestError(message, param="stream", code="unsupported_parameter")
        return _json(found.answer)

    @router.delete(f"{RESPONSES}/{{response_id}}")
    async def delete_response(response_id: str, request: Request) -> DeletedResponse:
        """Forget a response."""
        stored(request, response_id)
        store.remove(request.state.tenant, response_id)
        return DeletedResponse(id=response_id)

    @router.get(f"{RESPONSES}/{{response_id}}/input_items")
    async def list_input_items(
        response_id: str,
        request: Request,
        limit: Limit = DEFAULT_ITEMS,
        order: Literal["asc", "desc"] = "desc",
        after: str | None = None,
    ) -> ItemList:
        """What a response is an answer to, earlier responses included; the newest first unless `order` is `asc`."""
        items = stored(request, response_id).input_items()
        return page_of(items if order == "asc" else items[::-1], limit, after)

    @router.post(f"{RESPONSES}/{{response_id}}/cancel")
    async def cancel_response(response_id: str, request: Request) -> ResponsesAnswer:
        """Always refused: OpenAI's API cancels background responses, which this server has none of."""
        stored(request, response_id)
        raise RequestError(
            "only a response that runs in the background can be cancelled, and this server has none; close the "
            "connection of a response that is still streamed",
            param="response_id",
        )

    return router


def page_of(items: Sequence[InputItem], limit: int, after: str | None) -> ItemList:
    """The items behind the one with the id `after`, at most so many. Raises `RequestError` where there is none."""
    ids = [item.id for item in items]
    if after is not None and after not in ids:
        raise RequestError("after is the id of none of the items", param="after")
    start = 0 if after is None else ids.index(after) + 1
    page = items[start : start + limit]
    return ItemList(
        data=[item.to_answer() for item in page],
        first_id=page[0].id if page else None,
        last_id=page[-1].id if page else None,
        has_more=start + limit < len(items),
    )


def in_own_names(error: RequestError) -> RequestError:
    """A refusal by the code of chat completions, with the names that fields have here."""
    param = error.param or ""
    head = re.match(r"\w+", param)
    if head is not None and head[0] in OWN_NAMES:
        own = OWN_NAMES[head[0]] + ("" if head[0] == "messages" else param[head.end() :])
    else:
        own = re.sub(r"^(tools\[\d+\])\.function", r"\1", param)
    if own == param:
        return error
    return RequestError(str(error).replace(param, own), own, error.code)


def _json(body: bytes) -> Response:
    return Response(body, media_type="application/json")


def _unknown(response_id: str) -> str:
    return f"no response with the id {response_id[:100]!r} is kept: it never was, or newer ones took its place"
