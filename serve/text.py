"""Text to token ids and back for the HTTP layer, off the event loop."""

import asyncio
import concurrent.futures
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from emoe_jax.engine.structured import StructuredOutputsParams
from emoe_jax.errors import RequestError

Result = TypeVar("Result")

MAX_CHARS_PER_TOKEN = 128
"""No text needs fewer tokens than its length over this: longer tokens exist, but not all of them are."""

GRAMMAR_THREADS = 2
"""One grammar that takes seconds leaves another thread to the others."""

MAX_CACHED_TEXTS = 1 << 16
"""Tokens whose text is remembered: log probabilities of a long prompt ask for many, and often."""


class ServedTokenizer(Protocol):
    """What the server needs of the checkpoint's tokenizer."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...
    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str: ...
    def chat(
        self,
        messages: list[dict[str, str]],
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Raises `RequestError` when there is no template or when it refuses the messages, `CheckpointError` when it
        fails.
        """
        ...

    def token_text(self, token_id: int) -> str: ...
    def token_bytes(self, token_id: int, opening: bool = False) -> bytes: ...
    def begins_text(self, prompt: Sequence[int]) -> bool: ...


class ServedGrammars(Protocol):
    """What the server needs of the engine's grammars."""

    def compile(self, wanted: StructuredOutputsParams) -> object:
        """Raises `RequestError` for what answers cannot be held to."""
        ...


class TextCodec:
    """Tokenizer and grammars behind threads of their own, so that none of it stalls streams.

    `tokenizer` is None for a checkpoint without tokenizer files: such a model takes and returns token ids only.
    `template_kwargs` are variables of the chat template for requests that do not set them.
    """

    def __init__(
        self,
        tokenizer: ServedTokenizer | None,
        vocab_size: int,
        max_model_len: int,
        grammars: ServedGrammars | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ):
        self._tokenizer = tokenizer
        self._grammars = grammars
        self._template_kwargs = dict(template_kwargs or {})
        self.vocab_size = vocab_size
        self.max_model_len = max_model_len
        self.token_text = functools.lru_cache(MAX_CACHED_TEXTS)(self._token_text)
        self.token_bytes = functools.lru_cache(MAX_CACHED_TEXTS)(self._token_bytes)
        self._executor = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="tokenizer")
        self._compilers = concurrent.futures.ThreadPoolExecutor(GRAMMAR_THREADS, thread_name_prefix="grammars")

    async def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        tokenizer = self._required("prompt")
        self._check_length(len(text), "prompt")
        return await self._run(lambda: tokenizer.encode(text, add_special_tokens))

    async def chat(
        self,
        messages: list[dict[str, str]],
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a conversation under the chat template, with `kwargs` as its variables."""
        tokenizer = self._required("messages")
        self._check_length(sum(len(text) for message in messages for text in message.values()), "messages")
        self._check_length(len(json.dumps(kwargs or {})), "chat_template_kwargs")
        kwargs = {**self._template_kwargs, **(kwargs or {})}
        return await self._run(lambda: tokenizer.chat(messages, add_generation_prompt, continue_final_message, kwargs))

    async def decode(self, ids: list[int], param: str) -> str:
        tokenizer = self._tokenizer
        if tokenizer is None:
            raise RequestError("this model has no tokenizer, so its token ids have no text", param=param)
        if any(token >= self.vocab_size for token in ids):
            raise RequestError(f"token ids must be below the vocabulary size of {self.vocab_size}", param)
        return await self._run(lambda: tokenizer.decode(ids, skip_special_tokens=False))

    async def prepare(self, wanted: StructuredOutputsParams | None) -> object:
        """Compile what answers have to match: a grammar that the engine finds as long as the caller keeps it. Raises
        `RequestError` that says why answers cannot be held to it.
        """
        if wanted is None or self._grammars is None:
            return None
        return await asyncio.get_running_loop().run_in_executor(self._compilers, self._grammars.compile, wanted)

    def begins_text(self, prompt: Sequence[int]) -> bool:
        """Whether what follows the prompt is decoded as a text of its own."""
        return self._tokenizer is not None and self._tokenizer.begins_text(prompt)

    def _token_text(self, token_id: int) -> str:
        """The text of one token. OpenAI's `bytes:\\xa1` for part of a character, so that no two tokens read the same;
        vLLM's `token_id:N` where there is no tokenizer.
        """
        if self._tokenizer is None:
            return f"token_id:{token_id}"
        own = self.token_bytes(token_id)
        try:
            own.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in own)
        return self._tokenizer.token_text(token_id)

    def _token_bytes(self, token_id: int, opening: bool = False) -> bytes:
        """What one token adds to an answer, or to the beginning of one."""
        return b"" if self._tokenizer is None else self._tokenizer.token_bytes(token_id, opening)

    def close(self) -> None:
        for executor in (self._executor, self._compilers):
            executor.shutdown(wait=False, cancel_futures=True)

    def _required(self, param: str) -> ServedTokenizer:
        if self._tokenizer is None:
            instead = "no chat either; send token ids to /v1/completions" if param == "messages" else "send token ids"
            raise RequestError(f"this model has no tokenizer, {instead}", param=param)
        return self._tokenizer

    def _check_length(self, chars: int, param: str) -> None:
        """Refuse what cannot fit without tokenizing it: that takes seconds for megabytes of text."""
        if chars > self.max_model_len * MAX_CHARS_PER_TOKEN:
            raise RequestError(
                f"the prompt is too long: it has {chars} characters; this model's maximum context length is "
                f"{self.max_model_len} tokens, which hold far fewer",
                param=param,
                code="context_length_exceeded",
            )

    async def _run(self, function: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._executor, function)
