"""What an answer says, in order: thoughts, text, and calls of tools."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol


class Thought(NamedTuple):
    """A piece of what the model thought before it answered."""

    text: str


class Text(NamedTuple):
    """A piece of the answer itself."""

    text: str


class CallBegun(NamedTuple):
    """The model calls a tool; `call` counts the calls of an answer from 0."""

    call: int
    name: str


class CallArguments(NamedTuple):
    """A piece of the arguments of a call: JSON, of which the pieces are put together."""

    call: int
    text: str


Event = Thought | Text | CallBegun | CallArguments


class Parser(Protocol):
    """Reads an answer in pieces. What it says depends on their sum alone, wherever the pieces are cut."""

    @property
    def thinking(self) -> bool | None:
        """Whether what was read last is a thought; None while that is open, as in the middle of a tag."""
        ...

    def feed(self, text: str) -> list[Event]:
        """What has become certain with this piece."""
        ...

    def finish(self) -> list[Event]:
        """What is left at the end of the answer."""
        ...


class Collector:
    """Puts events together. Blanks around calls are nobody's text: models write them between tags."""

    def __init__(self) -> None:
        self.calls = 0
        """Calls that have begun."""
        self._events: list[Event] = []
        self._blanks: list[str] = []
        self._is_after_call = False

    def thought(self, text: str) -> None:
        """The model thinks on."""
        if text:
            self._events.append(Thought(text))

    def text(self, text: str) -> None:
        """The answer goes on. Blanks at its end wait: a call may follow."""
        body = text.rstrip()
        if body:
            self._events.append(Text("".join((*self._blanks, body))))
            self._blanks.clear()
            self._is_after_call = False
        if len(body) < len(text):
            self._blanks.append(text[len(body) :])

    def call(self, name: str) -> None:
        """A call begins; `arguments` belong to it from now on."""
        self._blanks.clear()
        self._is_after_call = True
        self._events.append(CallBegun(self.calls, name))
        self.calls += 1

    def arguments(self, text: str) -> None:
        """The arguments of the last call go on."""
        if text:
            self._events.append(CallArguments(self.calls - 1, text))

    def take(self) -> list[Event]:
        """The events since the last time, as few as possible."""
        events, self._events = joined(self._events), []
        return events

    def finish(self) -> list[Event]:
        """The rest. Blanks behind a call are left out."""
        if self._blanks and not self._is_after_call:
            self._events.append(Text("".join(self._blanks)))
        self._blanks.clear()
        return self.take()


def joined(events: Sequence[Event]) -> list[Event]:
    """The events with neighbouring pieces of one kind made one."""
    result: list[Event] = []
    for event in events:
        last = result[-1] if result else None
        if isinstance(event, CallBegun) or type(event) is not type(last):
            result.append(event)
        elif isinstance(last, CallArguments) and isinstance(event, CallArguments):
            if last.call == event.call:
                result[-1] = CallArguments(last.call, last.text + event.text)
            else:
                result.append(event)
        elif isinstance(last, Thought | Text):
            result[-1] = type(last)(last.text + event.text)
    return result
