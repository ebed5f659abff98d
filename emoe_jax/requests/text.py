"""From token ids to text that may be shown: incremental detokenisation and stop strings."""

from collections.abc import Iterable
from typing import Protocol, runtime_checkable


@runtime_checkable  # for the type checks in tests
class Detokenizer(Protocol):
    """Decodes one sequence token by token; text whose bytes are incomplete comes with a later token."""

    def add(self, token_id: int) -> str:
        """The text that is complete with this token and was not returned before; may be empty."""
        ...

    def flush(self) -> str:
        """The text that is still held back, at the end of the sequence."""
        ...


class _StopString:
    """Knuth-Morris-Pratt: how much of one stop string the text so far ends with, one character at a time."""

    def __init__(self, string: str):
        self.string = string
        self.matched = 0
        self._fallback = [0] * len(string)  # of each prefix, the longest proper prefix that it also ends with
        length = 0
        for index in range(1, len(string)):
            while length and string[index] != string[length]:
                length = self._fallback[length - 1]
            length += string[index] == string[length]
            self._fallback[index] = length

    def add(self, character: str) -> bool:
        """Whether this character completes the string; then no more may be added."""
        while self.matched and self.string[self.matched] != character:
            self.matched = self._fallback[self.matched - 1]
        self.matched += self.string[self.matched] == character
        return self.matched == len(self.string)


class TextStream:
    """The text of one completion as it grows.

    Text is cut before the stop string that completes first (of several completed by the same character, the longest),
    wherever the token boundaries lie. What could still become a stop string is held back, and nothing more.

    Without a detokeniser (a checkpoint that has no tokenizer) all text is empty.
    """

    def __init__(self, detokenizer: Detokenizer | None, stop: Iterable[str] = ()):
        self._detokenizer = detokenizer
        self._stops = [_StopString(string) for string in stop]
        self._held = ""
        self.stopped_by: str | None = None
        """The stop string that ended the text."""

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the text."""
        return self.stopped_by is not None

    def add(self, token_id: int) -> tuple[str, bool]:
        """Text that this token allows to emit, and whether a stop string has been reached."""
        if self.stopped or self._detokenizer is None:
            return "", self.stopped
        return self._emit(self._detokenizer.add(token_id)), self.stopped

    def flush(self) -> str:
        """The rest, when the completion ended for another reason; a stop string may turn up even here (`stopped`)."""
        if self.stopped or self._detokenizer is None:
            return ""
        text = self._emit(self._detokenizer.flush())
        if not self.stopped:
            text, self._held = text + self._held, ""
        return text

    def _emit(self, text: str) -> str:
        if not self._stops:
            return text
        pending = self._held + text
        for index, character in enumerate(text, start=len(self._held) + 1):
            # A list, not a generator: every automaton must see every character.
            complete = [len(stop.string) for stop in self._stops if stop.add(character)]
            if complete:
                start = index - max(complete)
                self.stopped_by = pending[start:index]
                self._held = ""
                return pending[:start]
        keep = len(pending) - max(stop.matched for stop in self._stops)
        self._held = pending[keep:]
        return pending[:keep]
