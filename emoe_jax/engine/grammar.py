"""Which tokens may come next for an answer to match a schema, an expression, a choice or a grammar: llguidance."""

import functools
import json
import logging
import re
import threading
from collections.abc import Iterable
from collections.abc import Sequence as Rows
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import UInt32

from emoe_jax.checkpoint import Tokenizer
from emoe_jax.engine.request import SamplingParams
from emoe_jax.engine.structured import StructuredOutputsParams
from emoe_jax.errors import RequestError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

log = logging.getLogger("emoe_jax")

SPACING: Any = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
"""A blank after commas and colons, or none: free to stretch JSON at will, models may do so until their tokens end."""

MAX_COMPILED = 16
"""Grammars that are kept for the next request."""

ANY_OBJECT = '{"type": "object"}'

EBNF_RULE = re.compile(r"^\s*[\w-]+\s*::=", re.MULTILINE)
"""What no grammar in Lark's notation has."""

MAX_EBNF_CHARS = 2**13
"""Its translation takes half a second at most then, and four times as long for twice as much."""


class Guide:
    """One sequence's way through its grammar. `allowed` says which tokens may come next, a bit each, lowest first."""

    def __init__(self, matcher: "LLMatcher", num_words: int):
        self._matcher = matcher
        self._num_words = num_words
        self.allowed = self._mask()

    @property
    def failed(self) -> bool:
        """Whether the grammar has become too costly to follow, so that the answer ends before it matches."""
        return self._matcher.is_error()

    def update(self, tokens: Iterable[int]) -> None:
        """The answer went on with these tokens."""
        for token in tokens:
            if not self._matcher.is_stopped():
                self._matcher.consume_token(token)
        self.allowed = self._mask()

    def _mask(self) -> UInt32[np.ndarray, " W"]:
        """Only the end of the text once the grammar is complete, and where it failed."""
        return np.frombuffer(self._matcher.compute_bitmask(), np.uint32)[: self._num_words]


class Grammars:
    """Compiles what requests ask for, and keeps the last few. Thread-safe."""

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int, eos_token_ids: Rows[int]):
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = list(eos_token_ids or (() if tokenizer is None else tokenizer.eos_token_ids))
        self._lock = threading.Lock()
        self._compiled = functools.lru_cache(MAX_COMPILED)(self._compile)

    def warm_up(self) -> None:
        """Read the vocabulary now, which takes a second if it is large. No matter if this model cannot be guided."""
        try:
            self.compile(StructuredOutputsParams(json_object=True))
        except RequestError as error:
            log.debug("no structured outputs: %s", error)

    def compile(self, wanted: StructuredOutputsParams) -> "LLMatcher":
        """A matcher at its start, to be copied. Raises `RequestError` that says why an answer cannot be held to it."""
        with self._lock:
            return self._compiled(wanted)

    def guide(self, params: SamplingParams) -> Guide | None:
        """A guide for one answer; None where anything may be answered. Raises as `compile`."""
        if params.structured_outputs is None:
            return None
        return Guide(self.compile(params.structured_outputs).deep_copy(), -(-self._vocab_size // 32))

    def _compile(self, wanted: StructuredOutputsParams) -> "LLMatcher":
        try:
            from llguidance import LLMatcher, LLParserLimits
        except ImportError:
            raise wanted.error("needs llguidance on the server: pip install 'emoe-jax[guided]'") from None
        if self._tokenizer is None:
            raise wanted.error("needs a tokenizer, which this model lacks")
        if not self._eos_token_ids:
            raise wanted.error("needs a token that ends a text, which this model lacks")
        try:
            vocabulary = self._vocabulary
        except Exception as error:  # the library raises many kinds for a tokenizer that it cannot read
            raise wanted.error(f"cannot be had with this model's tokenizer: {_reason(str(error))}") from None
        try:
            grammar = _grammar(wanted)
        except ValueError as error:
            raise wanted.error(f"cannot be used: {_reason(str(error))}") from None
        # A fraction of the defaults, under which one mask of a malicious expression takes ten seconds.
        limits = LLParserLimits(
            initial_lexer_fuel=200_000, step_lexer_fuel=50_000, max_lexer_states=10_000, verbose_errors=False
        )
        matcher = LLMatcher(vocabulary, grammar, log_level=0, limits=limits)
        if not matcher.is_error():
            matcher.compute_bitmask()  # most of the work, and where limits strike
        if matcher.is_error():
            raise wanted.error(f"cannot be used: {_reason(matcher.get_error())}")
        return matcher

    @functools.cached_property
    def _vocabulary(self) -> "LLTokenizer":
        from llguidance import LLTokenizer

        assert self._tokenizer is not None
        return LLTokenizer(self._tokenizer.continuation_json(), self._vocab_size, self._eos_token_ids)


def _grammar(wanted: StructuredOutputsParams) -> str:
    from llguidance import LLMatcher

    if wanted.regex is not None:
        return LLMatcher.grammar_from_regex(wanted.regex)
    if wanted.choice is not None:
        return LLMatcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, wanted.choice)))
    if wanted.grammar is not None:
        return LLMatcher.grammar_from_lark(_as_lark(wanted.grammar))
    return LLMatcher.grammar_from_json_schema(str(wanted.json or ANY_OBJECT), defaults=SPACING)


def _as_lark(grammar: str) -> str:
    """The grammar in the notation that the library reads. Raises `ValueError`."""
    if not EBNF_RULE.search(grammar):
        return grammar
    if len(grammar) > MAX_EBNF_CHARS:
        raise ValueError(
            f"{len(grammar)} characters of EBNF; at most {MAX_EBNF_CHARS} are taken, more of Lark's notation"
        )
    from llguidance.gbnf_to_lark import gbnf_to_lark

    try:
        return gbnf_to_lark(grammar)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except Exception as error:  # it raises bare ones
        raise ValueError(str(error)) from None


def _reason(message: str) -> str:
    """The one line of the library's complaint that says what is wrong."""
    if message.startswith("NoExtensionBias"):
        return "no text matches it"
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or lines or ["unknown error"])[0][:300]
