"""Which tokens may come next for an answer to match a schema, an expression, a choice or a grammar: llguidance."""

import decimal
import functools
import json
import logging
import math
import re
import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence as Rows
from typing import TYPE_CHECKING, Any, Protocol

from emoe_jax.errors import RequestError
from emoe_jax.requests.guide import Grammar, Guide, MaskThreads
from emoe_jax.requests.one_of import without_one_of
from emoe_jax.requests.request import SamplingParams
from emoe_jax.requests.structured_params import StructuredOutputsParams

if TYPE_CHECKING:
    from llguidance import LLTokenizer

log = logging.getLogger("emoe_jax")

SPACING: Any = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
"""A blank after commas and colons, or none: free to stretch JSON at will, models may do so until their tokens end."""

MAX_COMPILED = 16
"""Grammars that are kept for the next request."""

ANY_OBJECT = '{"type": "object"}'

EBNF_RULE = re.compile(r"^[^\S\n]*+[\w-]++\s*+::=", re.MULTILINE)
"""What no grammar in Lark's notation has. It never tries a character twice: Python's other threads stand still while an
expression is searched, and lines without any text would cost the square of their number.
"""

MAX_EBNF_CHARS = 2**13
"""Its translation takes half a second at most then, and four times as long for twice as much."""

MAX_MULTIPLE = 100_000
"""Compiles in three seconds."""

MULTIPLE = re.compile(r'"multipleOf"\s*+:\s*+(\d++(?:\.\d++)?+(?:[eE][+-]?\d{1,6}+)?+)')
ESCAPED = re.compile(r"\\u([0-9a-fA-F]{4})")


class Vocabulary(Protocol):
    """A tokenizer, as far as grammars need it."""

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a text; the first of them ends it in a grammar."""
        ...

    def continuation_json(self) -> str:
        """The tokenizer as it goes on with a text, in the format of `tokenizer.json`."""
        ...


class Grammars:
    """Compiles what requests ask for. A grammar is found again as long as anything uses it, the last few longer.

    Thread-safe. No lock is held while a grammar is compiled: finding one takes no time, whatever else is compiled.
    """

    def __init__(self, tokenizer: Vocabulary | None, vocab_size: int, eos_token_ids: Rows[int]):
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = list(eos_token_ids or (() if tokenizer is None else tokenizer.eos_token_ids))
        self._lock = threading.Lock()
        self._latest: OrderedDict[StructuredOutputsParams, Grammar] = OrderedDict()
        self._in_use: weakref.WeakValueDictionary[StructuredOutputsParams, Grammar] = weakref.WeakValueDictionary()
        self._threads = MaskThreads()

    def warm_up(self) -> None:
        """Read the vocabulary now, which takes a second if it is large. No matter if this model cannot be guided."""
        try:
            self.compile(StructuredOutputsParams(json_object=True))
        except RequestError as error:
            log.debug("no structured outputs: %s", error)

    def compile(self, wanted: StructuredOutputsParams) -> Grammar:
        """The grammar, which takes seconds at worst where it is not known. Raises `RequestError` that says why an
        answer cannot be held to it.
        """
        with self._lock:
            grammar = self._in_use.get(wanted)
        if grammar is None:
            grammar = self._compile(wanted)
        with self._lock:
            grammar = self._in_use.setdefault(wanted, grammar)
            self._latest[wanted] = grammar
            self._latest.move_to_end(wanted)
            if len(self._latest) > MAX_COMPILED:
                self._latest.popitem(last=False)
        return grammar

    def guide(self, params: SamplingParams) -> Guide | None:
        """A guide for one answer; None where anything may be answered. Raises as `compile`, and compiles what no
        `compile` on another thread has compiled before.
        """
        return None if params.structured_outputs is None else self.compile(params.structured_outputs).guide()

    def close(self) -> None:
        """End the threads that compute masks."""
        self._threads.close()

    def _compile(self, wanted: StructuredOutputsParams) -> Grammar:
        try:
            from llguidance import LLMatcher, LLParserLimits
        except ImportError:
            raise wanted.error("needs llguidance on the server: pip install 'emoe-jax[guided]'") from None
        if self._tokenizer is None:
            raise wanted.error("needs a tokenizer, which this model lacks")
        if not self._eos_token_ids:
            raise wanted.error("needs a token that ends a text, which this model lacks")
        try:
            vocabulary = self.vocabulary
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
        return Grammar(matcher, -(-self._vocab_size // 32), self._threads)

    @functools.cached_property
    def vocabulary(self) -> "LLTokenizer":
        from llguidance import LLTokenizer

        assert self._tokenizer is not None
        return LLTokenizer(self._tokenizer.continuation_json(), self._vocab_size, self._eos_token_ids)


def _grammar(wanted: StructuredOutputsParams) -> str:
    """In the form that the library compiles. Raises `ValueError`."""
    from llguidance import LLMatcher

    _check_multiples(wanted)
    if wanted.regex is not None:
        return LLMatcher.grammar_from_regex(wanted.regex)
    if wanted.choice is not None:
        return LLMatcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, wanted.choice)))
    if wanted.grammar is not None:
        return LLMatcher.grammar_from_lark(_as_lark(wanted.grammar))
    schema = without_one_of(str(wanted.json or ANY_OBJECT))
    return LLMatcher.grammar_from_json_schema(schema, defaults=SPACING)


def _check_multiples(wanted: StructuredOutputsParams) -> None:
    """Refuse a `multipleOf` that would compile for minutes: no limit of the library counts its states. Schemas that
    hold together have the states of their least common multiple. Raises `ValueError`.
    """
    text = ESCAPED.sub(lambda match: chr(int(match[1], 16)), str(wanted.json or wanted.grammar or ""))
    numbers: list[str] = MULTIPLE.findall(text)
    if "allOf" in text or "$ref" in text:
        needed = math.lcm(*map(_states, numbers))
    else:
        needed = max((int(min(_states(number), float(number))) for number in numbers), default=0)
    if needed > MAX_MULTIPLE:
        raise ValueError(f"its multipleOf needs {needed} states; at most {MAX_MULTIPLE} are taken")


def _states(number: str) -> int:
    """How many remainders a divisor has once it is scaled to an integer, at most about 10**24; powers of ten have 1."""
    digits = number.lower().partition("e")[0].replace(".", "").strip("0")
    exponent = decimal.Decimal(number).adjusted() + 1 - len(digits)
    zeros = min(max(exponent, 0), 12)
    return 1 if digits in ("", "1") else int(digits[:12]) * 10**zeros


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
