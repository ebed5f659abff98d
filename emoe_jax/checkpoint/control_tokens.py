"""Encoding of a rendered conversation in which the template alone may write control tokens.

The tokenizer itself says where it saw a control token, so whatever makes it see one (normalised letters, blanks beside
it, a text put together from two messages) is found. A token with a character that is not the template's own is cut in
two, and the parts are encoded for themselves. A conversation without such tokens is encoded as it is.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from emoe_jax.checkpoint.template_text import TemplateText
from emoe_jax.errors import RequestError

_BEFORE = "\n"
"""What a part is encoded behind, so that tokenizers do not take it for the beginning of a text."""

_MARKS = re.compile(r"[^\w\s]+")
_BEGINNINGS = ("a", "<", " a")


class _Part(NamedTuple):
    text: TemplateText
    inside: bool
    """Whether something comes before it."""


class _Encoded(NamedTuple):
    ids: list[int]
    spans: list[tuple[int, int, int]]
    """`(token, start, end)` of the control tokens."""


class ControlTokens:
    """`tokens` are those that only a template may write, by id. `tokenizer` is transformers'."""

    def __init__(self, tokenizer: Any, tokens: Mapping[int, str]):
        self._tokenizer = tokenizer
        self._tokens = dict(tokens)
        self._ids = {token: i for i, token in self._tokens.items()}
        longest_first = sorted(filter(None, self._ids), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        if tokenizer.is_fast:
            tokenizer.backend_tokenizer.no_truncation()  # what a file may ask for, and transformers does not do either
            tokenizer.backend_tokenizer.no_padding()
        self._before, *begun = (encoded.ids for encoded in self._encode([_BEFORE, *(_BEFORE + t for t in _BEGINNINGS)]))
        alone = (encoded.ids for encoded in self._encode(_BEGINNINGS))
        self._marks_beginnings = any(b != self._before + a for a, b in zip(alone, begun, strict=True))

    @property
    def tokens(self) -> Mapping[int, str]:
        """The text of each control token by its id. A message that holds such a text never becomes the token."""
        return self._tokens

    def encode(self, text: TemplateText) -> list[int]:
        """Token ids. Raises `RequestError` for a control token of a message that no cut turns into text."""
        line: list[_Part | list[int]] = [_Part(text, inside=False)]
        while parts := [part for part in line if isinstance(part, _Part)]:
            encoded = iter(self._parts(parts))
            done, line = line, []
            for part in done:
                line += self._cut(part, next(encoded)) if isinstance(part, _Part) else [part]
        return [i for ids in line if isinstance(ids, list) for i in ids]

    def hidden(self, text: TemplateText) -> list[str]:
        """Control tokens that `text` spells with characters that are not known to be the template's own."""
        return [match[0] for match in self._pattern.finditer(text) if b"\0" in text.owned[slice(*match.span())]]

    def _cut(self, part: _Part, encoded: _Encoded) -> Sequence[_Part | list[int]]:
        """The ids, or the parts of a part with control tokens that are not the template's."""
        cuts = []
        for token, start, end in encoded.spans:
            start, end = self._core(part.text, token, start, end)
            if b"\0" not in part.text.owned[start:end]:
                continue
            if end - start < 2:
                raise RequestError(
                    f"the messages hold {self._tokens[token]!r}, which this model reads as a control token", "messages"
                )
            marks = _MARKS.match(part.text, start, end)
            cuts.append(min(marks.end() if marks else start + 1, end - 1))
        if not cuts:
            return [encoded.ids]
        bounds = zip([0, *cuts], [*cuts, len(part.text)], strict=True)
        return [_Part(part.text[start:end], part.inside or start > 0) for start, end in bounds]

    def _core(self, text: str, token: int, start: int, end: int) -> tuple[int, int]:
        """Of a token's place, the characters that spell it: tokens may swallow the blanks beside them."""
        at = text.find(self._tokens[token], start, end)
        if at >= 0:
            return at, at + len(self._tokens[token])
        while start < end and text[start].isspace():
            start += 1
        while start < end and text[end - 1].isspace():
            end -= 1
        return start, end

    def _parts(self, parts: Sequence[_Part]) -> list[_Encoded]:
        before = [_BEFORE if part.inside and self._marks_beginnings else "" for part in parts]
        encoded = self._encode([b + str.__str__(part.text) for b, part in zip(before, parts, strict=True)])
        return [
            self._without_before(part, one) if b else one for b, part, one in zip(before, parts, encoded, strict=True)
        ]

    def _without_before(self, part: _Part, encoded: _Encoded) -> _Encoded:
        length = len(self._before)
        if encoded.ids[:length] != self._before:  # it has become one token with what follows
            return self._encode([part.text])[0]
        spans = [(i, max(0, start - len(_BEFORE)), end - len(_BEFORE)) for i, start, end in encoded.spans]
        return _Encoded(encoded.ids[length:], spans)

    def _encode(self, texts: Sequence[str]) -> list[_Encoded]:
        if not self._tokenizer.is_fast:
            return [self._encode_slowly(text) for text in texts]
        batch = self._tokenizer.backend_tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [
            _Encoded(one.ids, [(i, *place) for i, place in zip(one.ids, one.offsets, strict=True) if i in self._tokens])
            for one in batch
        ]

    def _encode_slowly(self, text: str) -> _Encoded:
        """With a tokenizer that does not say where its tokens are from."""
        ids = self._tokenizer.encode(text, add_special_tokens=False, verbose=False)
        return _Encoded(ids, [(self._ids[match[0]], *match.span()) for match in self._pattern.finditer(text)])
