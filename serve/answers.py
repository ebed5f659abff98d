"""Response bodies. `Omittable` fields are left out of the JSON when None; others appear as null, as OpenAI has it."""

from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, Field

Value = TypeVar("Value")
Omittable = Annotated[Value | None, Field(exclude_if=lambda value: value is None)]


class PromptTokensDetails(BaseModel):
    """`cached_tokens` of the prompt were not computed again: their pages were still there."""

    cached_tokens: int


class CompletionTokensDetails(BaseModel):
    """`reasoning_tokens` are those of the answers up to the end of their thoughts."""

    reasoning_tokens: int


class Usage(BaseModel):
    """Tokens of all prompts and all answers of a request. `prompt_tokens` include cached ones."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: Omittable[PromptTokensDetails] = None
    completion_tokens_details: Omittable[CompletionTokensDetails] = None
    """Where the server tells thoughts from answers, and no stop string can have held them back."""


class EmoeAnswer(BaseModel):
    """What the server decided for this request, and what other experts stood in for."""

    task: str | None
    routing: str
    tolerance: Annotated[float | None, Field(exclude_if=lambda value: value is None)] = None
    """Under `bounded`: the share of a token's router weight below which an absent expert could be left out."""
    substituted: float
    """Share of expert assignments."""
    substituted_weight: float
    """Share of router weight."""
    slo_unattainable: Annotated[bool, Field(exclude_if=lambda value: not value)] = False
    """Whether deadlines were given up while the request waited; left out when not."""


class CompletionLogprobs(BaseModel):
    """Null stands for the first token of an echoed prompt, which nothing precedes."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class CompletionChoice(BaseModel):
    """One answer. Choice `index` is its prompt's position times `n`, plus its number among that prompt's answers."""

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
    """One token with its text, its UTF-8 bytes and its natural log probability. `bytes` may be part of a character."""

    token: str
    bytes: list[int]
    logprob: float


class ChatLogprob(TopLogprob):
    """A token of the answer, with the most probable tokens at its place, most probable first."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """One entry for each token of the answer. `refusal` is always null: the server knows no refusals."""

    content: list[ChatLogprob]
    refusal: None = None


class FunctionCall(BaseModel):
    """The name of a tool, and its arguments as JSON."""

    name: str
    arguments: str


class ToolCallAnswer(BaseModel):
    """One call of a tool. The message with its result names the `id`."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class FunctionCallDelta(BaseModel):
    """The name comes first, then the arguments in pieces."""

    name: Omittable[str] = None
    arguments: str


class ToolCallDelta(BaseModel):
    """What a chunk adds to call `index`. Only the first has `id`, `type` and name."""

    index: int
    id: Omittable[str] = None
    type: Omittable[Literal["function"]] = None
    function: FunctionCallDelta


class AssistantMessage(BaseModel):
    """What an answer says. `refusal` is always null: the server knows no refusals."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    """Null where the answer calls tools and says nothing else."""
    refusal: None = None
    reasoning_content: Omittable[str] = None
    """What the model thought before it answered (vLLM's field)."""
    tool_calls: Omittable[list[ToolCallAnswer]] = None


class ChatChoice(BaseModel):
    """One answer of `n`. `finish_reason` is `stop`, `tool_calls`, `length` or `error`."""

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
    """What a chunk adds to an answer. Only the first chunk of an answer has a `role`."""

    role: Omittable[Literal["assistant"]] = None
    content: Omittable[str] = None
    reasoning_content: Omittable[str] = None
    tool_calls: Omittable[list[ToolCallDelta]] = None


class ChatChunkChoice(BaseModel):
    """A piece of answer `index`. `finish_reason` is null until the last piece."""

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
    """One name of the served model. `created` is a Unix time in seconds, `max_model_len` a number of tokens."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["emoe-jax"] = "emoe-jax"
    max_model_len: int
    default_sampling_params: Omittable[dict[str, float]] = None
    """Of requests that leave them open, where the checkpoint has its own."""
    tasks: Omittable[list[str]] = None
    """Those that a request may name, where it may not name any."""


class ModelList(BaseModel):
    """The served model's name and its aliases, the name first."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class TokenizeResponse(BaseModel):
    """Token ids of a text or a conversation. `token_strs` are there when the request asks for them."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: Omittable[list[str]] = None


class DetokenizeResponse(BaseModel):
    """The text of the token ids, special tokens by name."""

    prompt: str


class HealthResponse(BaseModel):
    """The server is healthy or ready, as the path asks. Otherwise the answer is an error with status 503."""

    status: Literal["ok"] = "ok"
