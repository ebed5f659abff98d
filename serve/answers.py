"""Response bodies. `Omittable` fields are left out of the JSON when None; others appear as null, as OpenAI has it."""

from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, Field

Value = TypeVar("Value")
Omittable = Annotated[Value | None, Field(exclude_if=lambda value: value is None)]


class PromptTokensDetails(BaseModel):
    cached_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: Omittable[PromptTokensDetails] = None


class EmoeAnswer(BaseModel):
    """What the server decided for this request, and the share of expert assignments that were substituted."""

    task: str | None
    routing: str
    substituted: float
    slo_unattainable: Annotated[bool, Field(exclude_if=lambda value: not value)] = False
    """Whether deadlines were given up while the request waited; left out when not."""


class CompletionLogprobs(BaseModel):
    """Null stands for the first token of an echoed prompt, which nothing precedes."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    prompt_token_ids: Omittable[list[int]] = None
    token_ids: Omittable[list[int]] = None


class CompletionResponse(BaseModel):
    """Answer of `/v1/completions`; a stream sends the same shape piece by piece."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Omittable[Usage] = None
    emoe: Omittable[EmoeAnswer] = None


class TopLogprob(BaseModel):
    token: str
    bytes: list[int]
    logprob: float


class ChatLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[ChatLogprob]
    refusal: None = None


class AssistantMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    token_ids: Omittable[list[int]] = None


class ChatResponse(BaseModel):
    """Answer of `/v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    emoe: EmoeAnswer
    prompt_token_ids: Omittable[list[int]] = None


class ChatDelta(BaseModel):
    role: Omittable[Literal["assistant"]] = None
    content: Omittable[str] = None


class ChatChunkChoice(BaseModel):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    token_ids: Omittable[list[int]] = None


class ChatChunk(BaseModel):
    """One event of a streamed chat answer."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Omittable[Usage] = None
    emoe: Omittable[EmoeAnswer] = None
    prompt_token_ids: Omittable[list[int]] = None


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["emoe-jax"] = "emoe-jax"
    max_model_len: int
    default_sampling_params: Omittable[dict[str, float]] = None
    """Of requests that leave them open, where the checkpoint has its own."""


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class TokenizeResponse(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: Omittable[list[str]] = None


class DetokenizeResponse(BaseModel):
    prompt: str


class HealthResponse(BaseModel):
    status: Literal["ok"] = "ok"
