"""The forms in which models write reasoning and calls of tools, and which of them a model uses."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

from serve.parsing import deepseek, glm_calls, harmony, mistral, tagged_calls, think
from serve.parsing.events import Parser

ReasoningForm = Literal["none", "think", "magistral", "harmony"]
CallForm = Literal["none", "hermes", "mistral", "qwen-xml", "glm", "deepseek", "harmony"]

Tools = Mapping[str, Mapping[str, Any]]
"""JSON schemas of parameters by the names of the tools."""

TAGS: Mapping[str, tuple[str, ...]] = {
    "none": (),
    "think": think.TAGS,
    "magistral": think.MAGISTRAL_TAGS,
    "harmony": harmony.TAGS,
    "hermes": (tagged_calls.OPEN, tagged_calls.CLOSE),
    "qwen-xml": (tagged_calls.OPEN, tagged_calls.CLOSE),
    "glm": (tagged_calls.OPEN, tagged_calls.CLOSE, *glm_calls.TAGS),
    "deepseek": deepseek.TAGS,
    "mistral": mistral.TAGS,
}
"""What each form is told by. Where a tag is a special token of the model, its text has to be shown to the parser."""


@dataclasses.dataclass(frozen=True)
class AnswerForm:
    """How a model writes its answers."""

    reasoning: ReasoningForm = "none"
    calls: CallForm = "none"

    @property
    def tags(self) -> tuple[str, ...]:
        """Tags of both, each once."""
        return tuple(dict.fromkeys((*TAGS[self.reasoning], *TAGS[self.calls])))

    @property
    def thought_tags(self) -> tuple[str, str] | None:
        """What begins and ends thoughts that stand before the answer; None where they are written otherwise."""
        return {"think": think.TAGS, "magistral": think.MAGISTRAL_TAGS}.get(self.reasoning)

    @property
    def ending_tags(self) -> tuple[str, ...]:
        """Tags that end an answer."""
        return harmony.ENDING if "harmony" in (self.reasoning, self.calls) else ()

    @property
    def forced_calls(self) -> CallForm:
        """The form of calls that the server makes a model write: of some that cannot be described exactly, another."""
        return self.calls if self.calls in ("mistral", "deepseek", "harmony") else "hermes"


PLAIN = AnswerForm()
"""Text alone, as it comes."""


def form_of(
    reasoning: str,
    calls: str,
    named: tuple[str | None, str | None] = (None, None),
    template_writes: Callable[[str], bool] = lambda text: False,
) -> AnswerForm:
    """The form that options ask for. "auto" is what the model's family has `named` for reasoning and calls, else what
    the chat template writes.
    """
    if reasoning == "auto":
        reasoning = named[0] or _reasoning_of(template_writes)
    if calls == "auto":
        calls = named[1] or _calls_of(template_writes)
    return AnswerForm(reasoning, calls)  # pyright: ignore[reportArgumentType]


def _reasoning_of(writes: Callable[[str], bool]) -> ReasoningForm:
    if writes(harmony.CHANNEL) and writes(harmony.MESSAGE):
        return "harmony"
    if writes(think.TAGS[1]):
        return "think"
    return "magistral" if writes(think.MAGISTRAL_TAGS[1]) else "none"


def _calls_of(writes: Callable[[str], bool]) -> CallForm:
    if writes(harmony.CHANNEL) and writes("functions."):
        return "harmony"
    if writes(mistral.OPEN):
        return "mistral"
    if writes(deepseek.CALL):
        return "deepseek"
    if not writes(tagged_calls.OPEN):
        return "none"
    if writes(glm_calls.KEY):
        return "glm"
    return "qwen-xml" if writes("<function=") else "hermes"


def call_parser(form: CallForm, tools: Tools) -> Parser | None:
    """What finds calls of these tools in an answer's text; None for no form at all."""
    match form:
        case "hermes":
            return tagged_calls.TaggedCalls(tools)
        case "qwen-xml":
            return tagged_calls.TaggedCalls(tools, "xml")
        case "glm":
            return tagged_calls.TaggedCalls(tools, "glm")
        case "deepseek":
            return deepseek.DeepSeekCalls(tools)
        case "mistral":
            return mistral.MistralCalls(tools)
        case "harmony":
            return harmony.HarmonyParser(tools, thoughts=False)
        case "none":
            return None


def reasoning_parser(form: ReasoningForm, opened: bool) -> Parser | None:
    """What tells thoughts from the answer; None for no form at all. With `opened`, the prompt has begun thoughts."""
    match form:
        case "think":
            return think.ThinkParser(opened)
        case "magistral":
            return think.ThinkParser(opened, think.MAGISTRAL_TAGS)
        case "harmony":
            return harmony.HarmonyParser()
        case "none":
            return None
