"""A checkpoint's chat template: what it renders, which roles it knows, which tokens it reads in messages."""

import functools
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import meta, nodes

from emoe_jax.checkpoint.template_environment import TemplateEnvironment
from emoe_jax.checkpoint.template_text import TemplateText
from emoe_jax.errors import RequestError
from emoe_jax.requests.request import RESERVED_VARIABLES

ROLES = ("system", "developer", "user", "assistant", "tool")

MAX_DEPTH = 64

STAND_INS = {"developer": "system", "tool": "user"}
"""Roles that templates need not know, and the roles that their messages have then."""

_REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names under which templates look for what an assistant thought. The first is the usual one."""

_READING = re.compile(r"count|(l|r)?strip|(end|start)swith|r?(find|index|partition|split)|remove(pre|suf)fix|replace")
"""Methods and filters whose first argument is looked for in a text."""


class ChatTemplate:
    """Raises jinja's `TemplateSyntaxError` when the source is no template."""

    def __init__(self, source: str):
        environment = _environment()
        tree = environment.parse(source)
        self._template = environment.from_string(source)
        self._names = {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
        self._shows_tools = "tools" in meta.find_undeclared_variables(tree)
        texts = {node.data for node in tree.find_all(nodes.TemplateData)} | self._names
        self._written = "\0".join(sorted(texts))
        self._read = "\0".join(sorted(_read_literals(tree)))

    def knows_role(self, role: str) -> bool:
        """Whether the template names the role. One that writes any role as it is given does not."""
        return role in self._names

    def writes(self, token: str) -> bool:
        """Whether the token is part of the template's own text."""
        return token in self._written

    @property
    def shows_tools(self) -> bool:
        """Whether the template looks at the tools of a request. One that does not drops them without a word."""
        return self._shows_tools

    def reads(self, token: str) -> bool:
        """Whether the template looks for the token in messages: those are expected to contain it."""
        return token in self._read

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        special_tokens: Mapping[str, Any],
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        kwargs: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> TemplateText:
        """The prompt. `special_tokens` and `kwargs` are variables; the text of the former counts as the template's own.

        Arguments of calls in messages are objects. A template that joins them to a text gets them in JSON.

        Raises `RequestError` for contradictions, and whatever the template raises.
        """
        given: dict[str, Any] = _plain(kwargs or {})
        for name in RESERVED_VARIABLES:
            if name in given:
                raise RequestError(f"chat_template_kwargs cannot set {name}", param="chat_template_kwargs")
        if continue_final_message and (add_generation_prompt or given.get("add_generation_prompt")):
            raise RequestError(
                "continue_final_message and add_generation_prompt cannot both be true", param="continue_final_message"
            )
        shown = [self._shown(message) for message in messages]
        tag = ""
        if continue_final_message:
            tag = f"FINAL_MESSAGE_{secrets.token_hex(8)} "  # the blank tells whether the template trims messages
            shown[-1] = _tagged(shown[-1], tag)
        variables = {
            "tools": _plain(tools, param="tools"),
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        variables |= {name: _owned(value) for name, value in special_tokens.items()}
        try:
            text = TemplateText(self._template.render({"messages": shown} | variables | given))
        except TypeError:
            written = [_with_written_arguments(message) for message in shown]
            if written == shown:
                raise
            text = TemplateText(self._template.render({"messages": written} | variables | given))
        return _until(text, tag, messages[-1]["content"]) if tag else text

    def _shown(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """A message as the template gets it."""
        shown = {name: _plain(value, param="messages") for name, value in message.items() if value is not None}
        role = shown.get("role")
        if role in STAND_INS and not self.knows_role(role):
            role = STAND_INS[role]
        if role in ROLES:  # one of a few words, which templates may build a token from
            shown["role"] = TemplateText.own(role)
        thought = next((shown[name] for name in _REASONING if name in shown), None)
        return shown if thought is None else {"thinking": thought, **shown, "reasoning_content": thought}


@functools.cache
def _environment() -> TemplateEnvironment:
    return TemplateEnvironment()


def _read_literals(tree: nodes.Template) -> set[str]:
    """Literals that are compared with something or looked for in something."""
    places: list[nodes.Node] = list(tree.find_all(nodes.Compare))
    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Getattr) and _READING.fullmatch(call.node.attr):
            places += call.args[:1]
    for call in tree.find_all(nodes.Filter):
        if _READING.fullmatch(call.name):
            places += call.args[:1]
    constants = [node for place in places for node in (place, *place.find_all(nodes.Const))]
    return {node.value for node in constants if isinstance(node, nodes.Const) and isinstance(node.value, str)}


def _plain(value: Any, depth: int = 0, param: str = "chat_template_kwargs") -> Any:
    """JSON's types alone, so that a template gets no methods but those of texts, lists and dicts. `param` is the field
    that is blamed for what is nested too deeply.
    """
    if depth > MAX_DEPTH:
        raise RequestError(f"lists and objects are nested more than {MAX_DEPTH} deep", param=param)
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return "".join([value])  # a plain one
    if isinstance(value, Mapping):
        return {_plain(name): _plain(part, depth + 1, param) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part, depth + 1, param) for part in value]
    raise RequestError(f"a {type(value).__name__} cannot be part of a message; expected JSON's types", "messages")


def _owned(value: Any) -> Any:
    return [_owned(part) for part in value] if isinstance(value, list | tuple) else TemplateText.own(str(value))


def _with_written_arguments(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose calls have their arguments as JSON."""
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return message
    functions = [{**call["function"], "arguments": json.dumps(call["function"]["arguments"])} for call in calls]
    written = [{**call, "function": function} for call, function in zip(calls, functions, strict=True)]
    return {**message, "tool_calls": written}


def _tagged(message: dict[str, Any], tag: str) -> dict[str, Any]:
    content = message.get("content")
    if not isinstance(content, str):
        raise RequestError("continue_final_message needs a last message with a text", param="continue_final_message")
    return {**message, "content": content + tag}


def _until(text: TemplateText, tag: str, content: str) -> TemplateText:
    """What comes before the tag at the end of the last message."""
    end = text.rfind(tag.strip())
    if end < 0 or content.strip() not in text:
        raise RequestError(
            "the chat template does not show the last message as it is, so it cannot be continued",
            param="continue_final_message",
        )
    return text[:end] if text[end : end + len(tag)] == tag else text[:end].rstrip()


def is_paired(token: str, vocabulary: Mapping[str, int]) -> bool:
    """Whether the token opens or closes something, such as `<think>` and `</think>`: turns of a conversation do not."""
    if re.fullmatch(r"[^\w\s]+/\w[\s\S]*", token):
        return token.replace("/", "", 1) in vocabulary
    return re.sub(r"^([^\w\s]+)", r"\1/", token, count=1) in vocabulary
