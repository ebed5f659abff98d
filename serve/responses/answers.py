"""Answers of `/v1/responses`, in OpenAI's shape."""

from typing import Any, Literal

from pydantic import BaseModel

from serve.answers import EmoeAnswer, Omittable

ItemStatus = Literal["in_progress", "completed", "incomplete"]
ResponseStatus = Literal["in_progress", "completed", "incomplete", "failed"]


class OutputPart(BaseModel):
    """A piece of a message, or of thoughts. `annotations` and `logprobs` of a message are always empty."""

    type: Literal["output_text", "reasoning_text"]
    text: str
    annotations: Omittable[list[Any]] = None
    logprobs: Omittable[list[Any]] = None


class OutputItem(BaseModel):
    """A message, thoughts, or a call of a tool, with the fields of its type."""

    id: str
    type: Literal["message", "reasoning", "function_call"]
    status: ItemStatus = "in_progress"
    role: Omittable[Literal["assistant"]] = None
    content: Omittable[list[OutputPart]] = None
    summary: Omittable[list[Any]] = None
    """Always empty: the thoughts themselves are `content`."""
    call_id: Omittable[str] = None
    name: Omittable[str] = None
    arguments: Omittable[str] = None


class InputTokensDetails(BaseModel):
    """`cached_tokens` of the prompt were not computed again: their pages were still there."""

    cached_tokens: int
    cache_write_tokens: int = 0


class OutputTokensDetails(BaseModel):
    """`reasoning_tokens` are those of the answer up to the end of its thoughts."""

    reasoning_tokens: int


class ResponsesUsage(BaseModel):
    """Tokens of the prompt, cached ones included, and of the answer, thoughts included."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponsesFailure(BaseModel):
    """Why an answer failed."""

    code: Literal["server_error"] = "server_error"
    message: str


class IncompleteDetails(BaseModel):
    """Why an answer is not whole."""

    reason: Literal["max_output_tokens"] = "max_output_tokens"


class ResponsesAnswer(BaseModel):
    """Answer of `/v1/responses`, with what was asked. Events of a stream have it as far as it has come."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None = None
    status: ResponseStatus = "in_progress"
    background: Literal[False] = False
    error: ResponsesFailure | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[OutputItem]
    parallel_tool_calls: bool
    previous_response_id: str | None
    reasoning: dict[str, Any]
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, str]
    tools: list[dict[str, Any]]
    top_p: float
    truncation: Literal["disabled"] = "disabled"
    usage: ResponsesUsage | None = None
    emoe: Omittable[EmoeAnswer] = None


class DeletedResponse(BaseModel):
    """The response is forgotten."""

    id: str
    object: Literal["response"] = "response"
    deleted: Literal[True] = True


class ItemList(BaseModel):
    """A page of the items that a response was an answer to."""

    object: Literal["list"] = "list"
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool
