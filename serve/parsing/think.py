"""Reasoning between two tags before an answer: `<think>` of Qwen3, DeepSeek-R1, GLM-4.5 and others, or Magistral's."""

from serve.parsing.events import Event, Text, Thought, joined
from serve.parsing.tags import find_first, may_become

TAGS = ("<think>", "</think>")
MAGISTRAL_TAGS = ("[THINK]", "[/THINK]")


class ThinkParser:
    """Thoughts stand before the answer: a tag behind its first character is text. Blanks around thoughts are dropped.

    With `opened`, the prompt ended in the first of the `tags`. Reasoning that is never closed takes all of the answer.
    """

    def __init__(self, opened: bool, tags: tuple[str, str] = TAGS):
        self._open_tag, self._close_tag = tags
        self.thinking: bool | None = True if opened else None
        self._buffer = ""
        self._blanks = ""  # of the thoughts, to be written when they go on
        self._has_thought = False
        self._has_closed = False
        self._may_repeat_tag = opened  # models write the tag again at times
        self._events: list[Event] = []

    def feed(self, text: str) -> list[Event]:
        """What has become certain with this piece."""
        self._buffer += text
        while self._buffer and self._step():
            pass
        return self._take()

    def finish(self) -> list[Event]:
        """What is left at the end of the answer: the beginning of a tag is text, or a thought."""
        rest, self._buffer = self._buffer, ""
        if self.thinking:
            self._think(rest)
        elif self.thinking is None:
            rest = rest.lstrip() if self._has_closed else rest
        if rest and not self.thinking:
            self._events.append(Text(rest))
        return self._take()

    def _take(self) -> list[Event]:
        events, self._events = joined(self._events), []
        return events

    def _step(self) -> bool:
        """Read on in the buffer; False where more of the answer has to come first."""
        if self.thinking is False:
            self._events.append(Text(self._buffer))
            self._buffer = ""
        elif self.thinking:
            return self._read_thoughts()
        else:
            start = self._buffer.lstrip()
            if may_become(start, (self._open_tag,)):
                return False
            if start.startswith(self._open_tag):
                self._open(start)
            else:
                self.thinking = False
                self._buffer = start if self._has_closed else self._buffer
        return True

    def _open(self, text: str) -> None:
        self._buffer = text.removeprefix(self._open_tag)
        self.thinking = True
        self._blanks = "\n" if self._has_thought else ""

    def _read_thoughts(self) -> bool:
        if self._may_repeat_tag:
            start = self._buffer.lstrip()
            if may_become(start, (self._open_tag,)):
                return False
            self._buffer = start.removeprefix(self._open_tag)
            self._may_repeat_tag = False
        found = find_first(self._buffer, (self._close_tag,))
        self._think(self._buffer[: found.start])
        self._buffer = self._buffer[found.end :]
        if found.tag is None:
            return False
        self.thinking, self._blanks, self._has_closed = None, "", True
        return True

    def _think(self, text: str) -> None:
        text = self._blanks + text
        if not self._has_thought:
            text = text.lstrip()
        body = text.rstrip()
        self._blanks = text[len(body) :]
        if body:
            self._events.append(Thought(body))
            self._has_thought = True
