"""How an answer appears: line by line with a live line below it at a terminal, as it comes elsewhere, or as JSON."""

import contextlib
import dataclasses
import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from serve.command.conversation import Answer, Piece

POLL_SECONDS = 0.5
STYLES = {"reasoning": "dim italic", "content": ""}
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    """Without characters that a terminal would obey."""
    return _CONTROLS.sub("", text)


class Screen(Protocol):
    """Where answers go."""

    def show(self, pieces: Iterable[Piece], line: Callable[[], str]) -> None:
        """Show pieces as they come. `line` says what the server does just now."""
        ...

    def end(self, answer: Answer, line: str) -> None:
        """Show the account of an answer that has ended, and what the server is at now."""
        ...

    def say(self, text: str) -> None:
        """A word of the command itself."""
        ...

    def fail(self, text: str) -> None:
        """An answer that there is none of."""
        ...


class Terminal:
    """For a person. Whole lines of an answer are printed; the line at hand and the live line are drawn anew."""

    def __init__(self, console: Console):
        self._console = console

    def show(self, pieces: Iterable[Piece], line: Callable[[], str]) -> None:
        current = Text()
        try:
            with Live(console=self._console, refresh_per_second=8, transient=True) as live, _polled(line) as latest:
                live.update(_drawn(current, latest()))
                for styled in _styled(pieces):
                    current.append(styled)
                    *whole, current = current.split("\n", allow_blank=True)
                    for one in whole:
                        self._console.print(one)
                    live.update(_drawn(current, latest()))
        finally:  # also of an answer that was stopped
            if current:
                self._console.print(current)

    def end(self, answer: Answer, line: str) -> None:
        for text in filter(None, (answer.account(), line)):
            self._console.print(Text(printable(text), style="dim"))

    def say(self, text: str) -> None:
        self._console.print(Text(printable(text), style="dim"))

    def fail(self, text: str) -> None:
        self._console.print(Text(f"error: {printable(text)}", style="red"))


class Plain(Terminal):
    """For a pipe: pieces as they come."""

    def show(self, pieces: Iterable[Piece], line: Callable[[], str]) -> None:
        for styled in _styled(pieces):
            self._console.print(styled, end="", soft_wrap=True)
        self._console.print()

    def end(self, answer: Answer, line: str) -> None:
        for text in filter(None, (answer.account(), line)):
            self._console.print(Text(f"[{printable(text)}]"), soft_wrap=True)


class AsJson(Plain):
    """One JSON object for each answer, in a line; everything else goes to stderr."""

    def show(self, pieces: Iterable[Piece], line: Callable[[], str]) -> None:
        for _ in pieces:
            pass

    def end(self, answer: Answer, line: str) -> None:
        print(json.dumps(dataclasses.asdict(answer)), flush=True)

    def fail(self, text: str) -> None:
        print(json.dumps({"error": text}), flush=True)


def _styled(pieces: Iterable[Piece]) -> Iterator[Text]:
    """Thoughts end in a line of their own."""
    before = ""
    for piece in pieces:
        if before == "reasoning" and piece.kind == "content":
            yield Text("\n")
        before = piece.kind
        yield Text(printable(piece.text), style=STYLES[piece.kind])


def _drawn(current: Text, line: str) -> Group:
    return Group(current, Text(printable(line), style="dim", no_wrap=True, overflow="ellipsis"))


@contextlib.contextmanager
def _polled(call: Callable[[], Any]) -> Iterator[Callable[[], Any]]:
    """The newest result of a call that a thread repeats, so that answers do not wait for it."""
    newest, ended = [""], threading.Event()

    def poll() -> None:
        while not ended.is_set():
            newest[0] = call()
            ended.wait(POLL_SECONDS)

    thread = threading.Thread(target=poll, name="residency line", daemon=True)
    thread.start()
    try:
        yield lambda: newest[0]
    finally:
        ended.set()
        thread.join(1.0)
