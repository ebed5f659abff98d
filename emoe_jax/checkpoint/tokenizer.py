"""Text to token ids and back with the tokenizer and chat template that a checkpoint brings along."""

import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError

from emoe_jax.checkpoint.chat_template import ChatTemplate, is_paired
from emoe_jax.checkpoint.control_tokens import ControlTokens
from emoe_jax.checkpoint.files import read_json
from emoe_jax.checkpoint.template_text import TemplateText
from emoe_jax.config import ModelConfig
from emoe_jax.errors import CheckpointError, ConfigError, RequestError

log = logging.getLogger("emoe_jax")

_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
_TEMPLATE = "chat_template.jinja"
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_INCOMPLETE = "\ufffd"
_ANSWER = {"role": "assistant", "content": "a"}
_CONTEXT = 8
"""Tokens of a prompt that may decide how the first token after it reads."""


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's letters for bytes: those that print stand for themselves, the rest follows from U+0100 on."""
    printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printing]
    return {chr(byte): byte for byte in printing} | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTE_OF = _byte_alphabet()


class Tokenizer:
    """A transformers tokenizer, without any code from the checkpoint. Encoding and decoding are thread-safe."""

    def __init__(self, tokenizer: Any, prepend_bos_id: int | None = None, eos_token_ids: Sequence[int] = ()):
        """`prepend_bos_id` replaces the special tokens that the tokenizer would add by this one, in front.
        `eos_token_ids` are the model's.
        """
        self.backend = tokenizer
        self._prepend_bos_id = prepend_bos_id
        vocabulary = tokenizer.get_vocab()
        self._size = max(vocabulary.values()) + 1
        self._byte_ids = frozenset(i for token, i in vocabulary.items() if _BYTE_TOKEN.fullmatch(token))
        self.special_ids = frozenset(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
        # The Rust tokenizer itself, where there is one: a token of each answer is decoded at every step.
        self._rust = tokenizer.backend_tokenizer if tokenizer.is_fast else None
        self._is_byte_level = self._rust is not None and _is_byte_level(self._rust)
        self._eos_ids = frozenset(eos_token_ids)
        self._template: ChatTemplate | None = None
        self._control: ControlTokens | None = None
        self._anchor = self.encode("a", add_special_tokens=False)[-1:]
        self._anchor_text = self.decode(self._anchor)

    @classmethod
    def load(
        cls, directory: str | Path, config: ModelConfig | None, chat_template: str | Path | None = None
    ) -> "Tokenizer | None":
        """The tokenizer of a checkpoint directory, or None when it has no tokenizer files. `config` is its model's.

        `chat_template` is a file, or the name of one of the checkpoint's templates where it has several. Raises
        `CheckpointError` that names the file when one cannot be loaded, or when the chat template is broken, and
        `ConfigError` when there is no such template.
        """
        directory = Path(directory)
        present = [name for name in _FILES if (directory / name).exists()]
        if not present:
            if chat_template is not None:
                raise ConfigError(f"chat_template is {str(chat_template)!r}, but {directory} has no tokenizer")
            return None
        prepend_bos_id, eos_ids = (None, ()) if config is None else (config.prepend_bos_id, config.eos_token_ids)
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # PyTorch is not needed
        from transformers import AutoTokenizer, T5Tokenizer  # seconds to import

        # OpenMoE names a tokenizer class of its own, in a file that is not to be run; it is T5's but for the BOS id.
        loader = T5Tokenizer if config is not None and config.family == "openmoe" else AutoTokenizer
        try:
            tokenizer = cls(loader.from_pretrained(str(directory), trust_remote_code=False), prepend_bos_id, eos_ids)
        except Exception as error:  # transformers raises anything from KeyError to pyo3's own
            raise CheckpointError(f"{_broken_file(directory, present)} cannot be loaded: {_reason(error)}") from None
        if chat_template is not None:
            tokenizer._use_chat_template(chat_template)
        tokenizer._check_chat_template(_template_file(directory, chat_template))
        return tokenizer

    @property
    def has_chat_template(self) -> bool:
        """Whether `chat` works: of several templates, one has to be the default."""
        template = self.backend.chat_template
        return isinstance(template, str) or (template is not None and "default" in template)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokenizer's own end-of-text id, if it has one; the model's are in `ModelConfig`."""
        eos = self.backend.eos_token_id
        return () if eos is None else (eos,)

    def template_writes(self, text: str) -> bool:
        """Whether the chat template has this text among its own; False without a template."""
        return self.has_chat_template and self._chat_template()[0].writes(text)

    @property
    def shows_tools(self) -> bool:
        """Whether the chat template tells the model of a request's tools; False without a template."""
        return self.has_chat_template and self._chat_template()[0].shows_tools

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids; special tokens are those that the checkpoint's tokenizer adds to a prompt."""
        if self._prepend_bos_id is not None:
            ids = self.backend.encode(text, add_special_tokens=False, verbose=False)
            return [self._prepend_bos_id, *ids] if add_special_tokens else ids
        return self.backend.encode(text, add_special_tokens=add_special_tokens, verbose=False)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of the ids; those beyond the tokenizer's vocabulary (padding of the embedding table) have none."""
        known = [i for i in ids if i < self._size]
        if self._rust is not None:
            return self._rust.decode(known, skip_special_tokens=skip_special_tokens)
        return self.backend.decode(known, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)

    def token_text(self, token_id: int) -> str:
        """The text that one token adds in the middle of a sequence (with its leading blank, special tokens by name)."""
        return self.decode([*self._anchor, token_id], skip_special_tokens=False)[len(self._anchor_text) :]

    def token_bytes(self, token_id: int, opening: bool = False) -> bytes:
        """UTF-8 that one token adds to a text, or to the beginning of one (`opening`): part of a character at times.

        None of a silent token. The bytes of an answer's tokens join to its text.
        """
        if self.is_silent(token_id):
            return b""
        text = self.decode([token_id]) if opening else self.token_text(token_id)
        if _INCOMPLETE not in text:
            return text.encode()
        own = self._own_bytes(self.backend.convert_ids_to_tokens(token_id))
        if own is None:
            return text.encode()  # a piece that spells U+FFFD
        # A decoder that drops the first blank of a text has dropped it here, too.
        return own.removeprefix(b" ") if opening and not text.startswith(" ") else own

    def _own_bytes(self, piece: str) -> bytes | None:
        """What a piece of the vocabulary stands for where it is written in bytes."""
        if _BYTE_TOKEN.fullmatch(piece):
            return bytes([int(piece[3:5], 16)])
        if self._is_byte_level and all(character in BYTE_OF for character in piece):
            return bytes(BYTE_OF[character] for character in piece)
        return None

    def begins_text(self, prompt: Sequence[int]) -> bool:
        """Whether what follows the prompt is decoded as a text of its own."""
        return not _text_end(self, prompt)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        kwargs: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """Token ids of a conversation under the chat template, which runs in a sandbox.

        The template gets the messages and `tools` as they are, and `kwargs` as variables. Only the template writes
        control tokens (`_control_tokens`): where a message or a tool holds the text of one, it stays text. With
        `continue_final_message` the prompt ends in the last message's text, and `add_generation_prompt` has to be
        false. Raises `RequestError` when there is no template or when it refuses the messages (`raise_exception`), and
        `CheckpointError` when the template itself fails.
        """
        text = self._render(messages, add_generation_prompt, continue_final_message, kwargs, tools)
        ids = self._chat_template()[1].encode(text)
        return ids if self._prepend_bos_id is None else [self._prepend_bos_id, *ids]

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        kwargs: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> TemplateText:
        try:
            template, _ = self._chat_template()
            special = self.backend.special_tokens_map
            return template.render(messages, special, add_generation_prompt, continue_final_message, kwargs, tools)
        except RequestError:
            raise
        except Exception as error:  # whatever a foreign template may raise
            if type(error) is TemplateError:  # of jinja's errors, raise_exception's is the only one of this very type
                message = f"the chat template refused the messages: {_reason(error)}"
                raise RequestError(message, param="messages") from None
            raise CheckpointError(f"the model's chat template failed on the messages: {_reason(error)}") from None

    def _chat_template(self) -> tuple[ChatTemplate, ControlTokens]:
        """Compiled when it is first asked for."""
        source = self.backend.chat_template
        if source is None:
            raise RequestError("this model has no chat template", param="messages")
        if self._template is None or self._control is None:
            if not isinstance(source, str):
                names = ", ".join(sorted(source))
                if "default" not in source:
                    raise RequestError(
                        f"this model has several chat templates ({names}) and none of them is its default, so it "
                        "cannot chat; start the server with --chat-template NAME",
                        param="messages",
                    )
                source = source["default"]
            template = ChatTemplate(source)
            self._control = ControlTokens(self.backend, self._control_tokens(template))
            self._template = template
        return self._template, self._control

    def _control_tokens(self, template: ChatTemplate) -> dict[int, str]:
        """Tokens that only the template may write, by id: the special ones, what ends an answer, and what else the
        template marks turns with, such as DeepSeek's `<｜User｜>`.

        Not those that messages are expected to hold: tokens that are not special and come in pairs, such as `<think>`
        and `</think>`, or for which the template itself looks in messages. Answers that come back as history contain
        them. transformers, and servers that use it, read them as tokens too.
        """
        tokenizer, vocabulary = self.backend, self.backend.get_vocab()
        tokens = {i: token.content for i, token in tokenizer.added_tokens_decoder.items()}
        named = {*self.special_ids, *tokenizer.all_special_ids, *(i for i in self._eos_ids if i in tokens)}
        listed = set(getattr(tokenizer, "chat_control_tokens", None) or ())

        def is_markup(token: str) -> bool:
            if token in listed:
                return True
            expected = token.isspace() or template.reads(token) or is_paired(token, vocabulary)
            return template.writes(token) and not expected

        control = {i: token for i, token in tokens.items() if i in named or is_markup(token)}
        return control | {i: tokenizer.convert_ids_to_tokens(i) for i in named if i not in control}

    def continuation_json(self) -> str:
        """The `tokenizer.json` of what encodes a text in the middle of another: no blank is put before it.

        Raises `AttributeError` for a tokenizer that has no such form.
        """
        spec = json.loads(self.backend.backend_tokenizer.to_str())
        return json.dumps(_without_prefix({**spec, "padding": None, "truncation": None}))

    def stream(self, prompt: Sequence[int] = (), shown: Sequence[int] = ()) -> "TokenStream":
        """An incremental decoder of what follows a prompt. Special tokens that are `shown` have their names as text."""
        return TokenStream(self, prompt, shown)

    def _use_chat_template(self, template: str | Path) -> None:
        own = self.backend.chat_template
        named = own if isinstance(own, dict) else {}
        if str(template) in named:
            self.backend.chat_template = named[str(template)]
            return
        try:
            self.backend.chat_template = Path(template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not a UTF-8 text file"
            names = f", nor one of this model's templates: {', '.join(sorted(named))}" if named else ""
            raise ConfigError(f"chat_template is {str(template)!r}, which cannot be read: {reason}{names}") from None

    def _check_chat_template(self, file: Path) -> None:
        """Raise `CheckpointError` when the template cannot even render the simplest conversation. Warn when it hides
        from us that control tokens are its own.
        """
        if not self.has_chat_template:
            return
        question = {"role": "user", "content": "a"}
        hidden: set[str] = set()
        for messages in ([question], [{"role": "system", "content": "a"}, question, _ANSWER, question]):
            try:
                text = self._render(messages)
                hidden.update(self._chat_template()[1].hidden(text))
            except RequestError:
                pass  # it renders, and has its own idea of a conversation
            except CheckpointError as error:
                if len(messages) == 1:
                    raise CheckpointError(f"{file}: {error}") from None
        if hidden:
            log.warning(
                "%s: the chat template computes %s from other texts; such tokens are read as text",
                file,
                ", ".join(sorted(hidden)),
            )

    def is_silent(self, token_id: int) -> bool:
        """Whether the token has no text of its own: special tokens and ids beyond the vocabulary."""
        return token_id in self.special_ids or token_id >= self._size

    def special_id(self, token: str) -> int | None:
        """The id of a special token that is called so. None where there is none: then it is written as text."""
        special = self.backend.added_tokens_decoder
        return next((i for i in self.special_ids if special[i].content == token), None)

    def is_byte(self, token_id: int) -> bool:
        """Whether the token is a single byte, whose meaning depends on the bytes that follow."""
        return token_id in self._byte_ids


class TokenStream:
    """Decodes one sequence token by token: the pieces and the final `flush` concatenate to `decode` of all tokens.

    After a prompt that ends in text, they are what continues that text, with the blank that may stand between.

    A piece is what a short window of tokens decodes to beyond what its older half decodes to, because decoders treat
    the first token of a text differently. Nothing is emitted while the text ends in an incomplete character.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = (), shown: Sequence[int] = ()):
        self.backend = tokenizer
        self._shown = frozenset(shown)
        # Tokens of the last piece, then tokens that have given none yet. The end of the prompt is such a last piece.
        self._window = _text_end(tokenizer, prompt)
        self._emitted = len(self._window)  # of the window, how many tokens have given a piece
        self._emitted_text = tokenizer.decode(self._window)

    def add(self, token_id: int) -> str:
        """Text that has become certain with this token."""
        if token_id in self._shown:
            text = self.flush() + self.backend.backend.convert_ids_to_tokens(token_id)
            self._window, self._emitted, self._emitted_text = [], 0, ""  # what follows is a text of its own
            return text
        if self.backend.is_silent(token_id):
            return ""
        self._window.append(token_id)
        if self.backend.is_byte(token_id):
            return ""
        text = self.backend.decode(self._window)
        if text.endswith(_INCOMPLETE) or len(text) <= len(self._emitted_text):
            return ""
        return self._emit(text)

    def flush(self) -> str:
        """What is left at the end of the sequence; incomplete characters become U+FFFD, as in `decode`."""
        return self._emit(self.backend.decode(self._window))

    def _emit(self, text: str) -> str:
        piece = text[len(self._emitted_text) :]
        self._window = self._window[self._emitted :]
        self._emitted = len(self._window)
        self._emitted_text = self.backend.decode(self._window)
        return piece


def _broken_file(directory: Path, present: Sequence[str]) -> Path:
    """Which of a tokenizer's files to blame: the first that is no JSON object, else the vocabulary itself."""
    for name in (*present, "tokenizer_config.json"):
        path = directory / name
        if path.suffix == ".json" and path.exists():
            try:
                read_json(path)
            except CheckpointError:
                return path
    return directory / present[0]


def _is_byte_level(backend: Any) -> bool:
    """Whether pieces of the vocabulary are written in `BYTE_OF`'s letters."""
    return backend.decoder is not None and b'"ByteLevel"' in backend.decoder.__getstate__()


def _template_file(directory: Path, chat_template: str | Path | None) -> Path:
    """The file to blame for a chat template."""
    if chat_template is not None and Path(chat_template).is_file():
        return Path(chat_template)
    return directory / (_TEMPLATE if (directory / _TEMPLATE).exists() else "tokenizer_config.json")


def _without_prefix(spec: Any) -> Any:
    """A part of a `tokenizer.json`, without what puts a blank before every text."""
    if isinstance(spec, list):
        return [_without_prefix(part) for part in spec]
    if not isinstance(spec, dict):
        return spec
    never = {"add_prefix_space": False, "prepend_scheme": "never"}
    return {name: never.get(name, _without_prefix(part)) for name, part in spec.items()}


def _reason(error: Exception) -> str:
    """What went wrong, in one line; a bare key is no sentence."""
    text = " ".join(str(error).split())
    return f"{text} is missing" if isinstance(error, KeyError) else text or type(error).__name__


def _text_end(tokenizer: Tokenizer, prompt: Sequence[int]) -> list[int]:
    """The last few tokens of a prompt, back to a silent one; none when they do not end in a whole character."""
    end: list[int] = []
    for token_id in reversed(prompt[-_CONTEXT:]):
        if tokenizer.is_silent(token_id):
            break
        end.insert(0, token_id)
    return [] if tokenizer.decode(end).endswith(_INCOMPLETE) else end
