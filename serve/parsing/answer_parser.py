"""One answer from its text to what it says: reasoning first, then calls of tools in the rest."""

from serve.parsing.events import CallArguments, CallBegun, Event, Parser, Text, joined
from serve.parsing.forms import AnswerForm, Tools, call_parser, reasoning_parser
from serve.parsing.harmony import HarmonyParser


class AnswerParser:
    """`tools` are those that may be called, None where none are. Without `parallel`, calls behind the first are left
    out. With `opened`, the prompt has begun the thoughts. A `forced` answer is held to thoughts and calls.
    """

    def __init__(
        self,
        form: AnswerForm,
        tools: Tools | None = None,
        *,
        opened: bool = False,
        parallel: bool = True,
        forced: bool = False,
    ):
        self.reasoning_tokens = 0
        """Tokens up to the end of the last thought, of those that `feed` was told of."""
        self.calls = 0
        """Calls of tools so far."""
        self._parallel = parallel
        self._forced = forced
        self._open_tokens = 0  # behind the last thought, and perhaps before another one
        self._reasoning: Parser | None = reasoning_parser(form.reasoning, opened)
        self._calls: Parser | None = None if tools is None else call_parser(form.calls, tools)
        if tools is not None and form.reasoning == form.calls == "harmony":
            self._reasoning, self._calls = HarmonyParser(tools), None

    def feed(self, text: str, tokens: int = 0) -> list[Event]:
        """What has become certain with this piece, which `tokens` tokens have added."""
        if self._reasoning is None:
            return self._pass_on([Text(text)] if text else [])
        before = self._reasoning.thinking
        events = self._reasoning.feed(text)
        self._open_tokens += tokens
        if before or self._reasoning.thinking:
            self.reasoning_tokens += self._open_tokens
        if before or self._reasoning.thinking is not None:
            self._open_tokens = 0
        return self._pass_on(events)

    def finish(self) -> list[Event]:
        """What is left at the end of the answer. Of a forced one that is markup of a call that was cut: no text."""
        events = self._pass_on([] if self._reasoning is None else self._reasoning.finish())
        events += self._counted([] if self._calls is None else self._calls.finish())
        return joined([event for event in events if not (self._forced and isinstance(event, Text))])

    def _pass_on(self, events: list[Event]) -> list[Event]:
        if self._calls is None:
            return self._counted(events)
        result: list[Event] = []
        for event in events:
            result += self._calls.feed(event.text) if isinstance(event, Text) else [event]
        return self._counted(result)

    def _counted(self, events: list[Event]) -> list[Event]:
        self.calls += sum(isinstance(event, CallBegun) for event in events)
        if self._parallel:
            return events
        self.calls = min(self.calls, 1)
        return [event for event in events if not (isinstance(event, CallBegun | CallArguments) and event.call)]
