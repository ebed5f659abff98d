"""Text to token ids and back for the HTTP layer, off the event loop."""

import asyncio
import concurrent.futures
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from emoe_jax.errors import RequestError
from emoe_jax.requests.structured_params import StructuredOutputsParams
from serve.lanes import GRAMMAR_BYTES, MAX_WAITING_BYTES, Room, TextLanes, size_of

MAX_CHARS_PER_TOKEN = 128
"""No text needs fewer tokens than its length over this: longer tokens exist, but not all of them are."""

GRAMMAR_THREADS = 2
"""One grammar that takes seconds leaves another thread to the others."""

PIECE_CHARS_PER_TOKEN = 8
MIN_PIECE = 2**16
"""Characters: a text of more than these, and of more than 8 per token of the context, is measured in such pieces."""

MESSAGE_BYTES = 128
"""What a message of a conversation counts for besides its content: templates write around it."""

BYTES_PER_ID = 4

TOKENS_PER_CUT = 64
"""How many tokens a cut adds at most: a word falls into two."""

TAG_TOKENS = 16
"""How many tokens at the end of a prompt hold a tag and the blanks behind it."""

MAX_CACHED_TEXTS = 1 << 16
"""Tokens whose text is remembered: log probabilities of a long prompt ask for many, and often."""


class ServedTokenizer(Protocol):
    """What the server needs of the checkpoint's tokenizer."""

    @property
    def shows_tools(self) -> bool:
        """Whether the chat template tells the model of a request's tools."""
        ...

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids; special tokens are those that the checkpoint's tokenizer adds to a prompt."""
        ...

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        """The text of the ids. An id beyond the tokenizer's vocabulary has none."""
        ...

    def chat(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        kwargs: Mapping[str, Any] | None = None,
        tools: list[dict[str, Any]] | None = None,
    ) -> list[int]:
        """Raises `RequestError` when there is no template or when it refuses the messages, `CheckpointError` when it
        fails.
        """
        ...

    def token_text(self, token_id: int) -> str:
        """The text that a token adds in the middle of a text, with its leading blank."""
        ...

    def token_bytes(self, token_id: int, opening: bool = False) -> bytes:
        """UTF-8 that a token adds, to the beginning of a text with `opening`; may be part of a character."""
        ...

    def begins_text(self, prompt: Sequence[int]) -> bool:
        """Whether the text after this prompt is decoded by itself, without the prompt's end."""
        ...

    def special_id(self, token: str) -> int | None:
        """The id of a special token that is called so; answers do not show it unless they are asked to."""
        ...


class ServedGrammars(Protocol):
    """What the server needs of the engine's grammars."""

    def compile(self, wanted: StructuredOutputsParams) -> object:
        """Raises `RequestError` for what answers cannot be held to."""
        ...


class TextCodec:
    """Tokenizer and grammars behind threads of their own, so that none of it stalls streams.

    `tokenizer` is None for a checkpoint without tokenizer files: such a model takes and returns token ids only.
    `template_kwargs` are variables of the chat template for requests that do not set them.
    What waits for the tokenizer is bounded by `max_waiting_bytes`, and so are the grammars that wait to be compiled:
    `QueueFull` is raised for more.
    """

    def __init__(
        self,
        tokenizer: ServedTokenizer | None,
        vocab_size: int,
        max_model_len: int,
        grammars: ServedGrammars | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        max_waiting_bytes: int = MAX_WAITING_BYTES,
    ):
        self._tokenizer = tokenizer
        self._grammars = grammars
        self._template_kwargs = dict(template_kwargs or {})
        self.vocab_size = vocab_size
        self.max_model_len = max_model_len
        self.token_text = functools.lru_cache(MAX_CACHED_TEXTS)(self._token_text)
        self.token_bytes = functools.lru_cache(MAX_CACHED_TEXTS)(self._token_bytes)
        self.special_ids = functools.cache(self._special_ids)
        self._lanes = TextLanes(max_waiting_bytes)
        self._grammar_room = Room(max_waiting_bytes, GRAMMAR_BYTES, "grammar compiler")
        self._compilers = concurrent.futures.ThreadPoolExecutor(GRAMMAR_THREADS, thread_name_prefix="grammars")

    async def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, which may be longer than the context."""
        tokenizer = self._required("prompt")
        self._check_length(len(text), "prompt")
        size = size_of(text)
        with self._lanes.reserve(1, size):
            return await self._lanes.run(size, lambda: tokenizer.encode(text, add_special_tokens))

    async def encode_all(self, prompts: Sequence[str | list[int]], add_special_tokens: bool = True) -> list[list[int]]:
        """Token ids of a request's prompts, texts of which have to fit the context. Raises `RequestError`."""
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        if not texts:
            return [prompt for prompt in prompts if not isinstance(prompt, str)]
        tokenizer = self._required("prompt")
        for text in texts:
            self._check_length(len(text), "prompt")

        def encode(text: str) -> list[int]:
            self._check_tokens([text], "prompt")
            return tokenizer.encode(text, add_special_tokens)

        sizes = [size_of(prompt) if isinstance(prompt, str) else 0 for prompt in prompts]
        with self._lanes.reserve(len(texts), sum(sizes)):
            return [
                await self._lanes.run(size, functools.partial(encode, prompt)) if isinstance(prompt, str) else prompt
                for prompt, size in zip(prompts, sizes, strict=True)
            ]

    async def chat(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        kwargs: Mapping[str, Any] | None = None,
        tools: list[dict[str, Any]] | None = None,
        *,
        must_fit: bool = True,
    ) -> list[int]:
        """Token ids of a conversation under the chat template, with `kwargs` as its variables. With `must_fit`, a
        `RequestError` is raised for texts that have more tokens than the context.
        """
        tokenizer = self._required("messages")
        tools_text = [json.dumps(tool, ensure_ascii=False) for tool in tools or ()]
        texts = [_text_of(value) for message in messages for value in message.values()] + tools_text
        variables = json.dumps(kwargs or {})
        self._check_length(sum(map(len, texts)), "messages")
        self._check_length(len(variables), "chat_template_kwargs")
        kwargs = {**self._template_kwargs, **(kwargs or {})}

        def encode() -> list[int]:
            if must_fit:
                self._check_tokens([*(message["content"] for message in messages), *tools_text], "messages")
            return tokenizer.chat(messages, add_generation_prompt, continue_final_message, kwargs, tools)

        size = sum(map(size_of, texts)) + len(variables) + MESSAGE_BYTES * len(messages)
        with self._lanes.reserve(1, size):
            return await self._lanes.run(size, encode)

    async def decode(self, ids: list[int], param: str) -> str:
        """The text of the ids, special tokens by name. Raises `QueueFull` when too much text waits.

        Raises `RequestError` for the field `param` without a tokenizer, or for an id beyond the vocabulary.
        """
        tokenizer = self._tokenizer
        if tokenizer is None:
            raise RequestError("this model has no tokenizer, so its token ids have no text", param=param)
        if any(token >= self.vocab_size for token in ids):
            raise RequestError(f"a token id is outside the vocabulary of {self.vocab_size}", param)
        size = BYTES_PER_ID * len(ids)
        with self._lanes.reserve(1, size):
            return await self._lanes.run(size, lambda: tokenizer.decode(ids, skip_special_tokens=False))

    async def prepare(self, wanted: StructuredOutputsParams | None) -> object:
        """Compile what answers have to match: a grammar that the engine finds as long as the caller keeps it. Raises
        `RequestError` that says why answers cannot be held to it, and `QueueFull`. When the caller is cancelled before
        the grammar's turn, it is not compiled.
        """
        if wanted is None or self._grammars is None:
            return None
        with self._grammar_room.reserve(1, wanted.size):
            return await asyncio.get_running_loop().run_in_executor(self._compilers, self._grammars.compile, wanted)

    def begins_text(self, prompt: Sequence[int]) -> bool:
        """Whether what follows the prompt is decoded as a text of its own."""
        return self._tokenizer is not None and self._tokenizer.begins_text(prompt)

    def ends_in(self, prompt: Sequence[int], tag: str) -> bool:
        """Whether the text of a prompt ends in this tag, blanks aside."""
        if self._tokenizer is None:
            return False
        return self._tokenizer.decode(list(prompt[-TAG_TOKENS:]), skip_special_tokens=False).rstrip().endswith(tag)

    def _special_ids(self, tags: tuple[str, ...]) -> tuple[int, ...]:
        """Those of the tags that are special tokens of the model."""
        return tuple(i for i in map(self.special_id, tags) if i is not None)

    @property
    def shows_tools(self) -> bool:
        """Whether the model is told of a request's tools."""
        return self._tokenizer is not None and self._tokenizer.shows_tools

    def special_id(self, tag: str) -> int | None:
        """The id of a tag that is a special token of the model."""
        return None if self._tokenizer is None else self._tokenizer.special_id(tag)

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
        """Drop texts and grammars whose turn has not come. Does not wait for those in work."""
        self._lanes.close()
        self._compilers.shutdown(wait=False, cancel_futures=True)

    def _required(self, param: str) -> ServedTokenizer:
        if self._tokenizer is None:
            instead = "no chat either; send token ids to /v1/completions" if param == "messages" else "send token ids"
            raise RequestError(f"this model has no tokenizer, {instead}", param=param)
        return self._tokenizer

    def _check_tokens(self, texts: Sequence[str], param: str) -> None:
        """Refuse texts that are too long before they are tokenized whole: other threads stand still while millions of
        token ids are handed over. Texts are cut into pieces, which have a few tokens more than the whole at each cut.
        """
        piece = max(MIN_PIECE, self.max_model_len * PIECE_CHARS_PER_TOKEN)
        if sum(map(len, texts)) <= piece:
            return
        tokenizer = self._required(param)
        least = 0
        for text in texts:
            for start in range(0, len(text), piece):
                least += max(0, len(tokenizer.encode(text[start : start + piece], False)) - TOKENS_PER_CUT)
                if least > self.max_model_len:
                    raise RequestError(
                        f"the prompt is too long: it has more than {least} tokens; this model's maximum context length "
                        f"is {self.max_model_len} tokens, one of them for the answer",
                        param=param,
                        code="context_length_exceeded",
                    )

    def _check_length(self, chars: int, param: str) -> None:
        """Refuse what cannot fit without tokenizing it: that takes seconds for megabytes of text."""
        if chars > self.max_model_len * MAX_CHARS_PER_TOKEN:
            raise RequestError(
                f"the prompt is too long: it has {chars} characters; this model's maximum context length is "
                f"{self.max_model_len} tokens, which hold far fewer",
                param=param,
                code="context_length_exceeded",
            )


def _text_of(value: Any) -> str:
    """A text as it is, calls and tools as JSON: about what a template writes of them."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
