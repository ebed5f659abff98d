"""What a request says about tools: OpenAI's `tools`, `tool_choice` and `parallel_tool_calls`, and earlier calls."""

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator, field_validator, model_validator

from emoe_jax.errors import RequestError
from emoe_jax.requests.structured_params import StructuredOutputsParams
from serve.parsing.call_grammar import ANY_ARGUMENTS, CallGrammar, SpecialId, UnfitSchema
from serve.parsing.forms import AnswerForm, Tools
from serve.strict import StrictModel
from serve.validation import found, named

MAX_TOOLS = 512
MAX_NAME = 128
MAX_CALLS = 256
"""Of one message."""

_CHOICES = ("none", "auto", "required")
_EXPECTED_CHOICE = (
    'expected "none", "auto", "required" or {"type": "function", "function": {"name": "..."}}, a function of tools'
)


def _name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", value):
        raise ValueError("has other characters than letters, digits, underscores, dots and dashes")
    return value


ToolName = Annotated[str, Field(min_length=1, max_length=MAX_NAME), AfterValidator(_name)]


def check_parameters(value: Any) -> Any:
    """A JSON schema of an object, as far as its own keys say. Raises `ValueError`."""
    if not isinstance(value, dict):
        raise ValueError(f"is {found(value)}; expected a JSON schema of an object")
    if value.get("type", "object") != "object":
        raise ValueError('has another type than "object"; arguments are objects')
    properties, required = value.get("properties", {}), value.get("required", [])
    if not isinstance(properties, dict) or not all(isinstance(part, dict | bool) for part in properties.values()):
        raise ValueError("has properties that are no schemas by name")
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise ValueError("has a required that is no list of names")
    return value


class FunctionTool(StrictModel):
    """With `strict`, the server makes calls of it match `parameters`."""

    name: ToolName
    description: str | None = None
    parameters: Annotated[dict[str, Any] | None, BeforeValidator(lambda v: v if v is None else check_parameters(v))] = (
        None
    )
    strict: bool | None = None


class Tool(StrictModel):
    """OpenAI's; functions are the one type that is taken."""

    type: Literal["function"]
    function: FunctionTool

    def to_template(self) -> dict[str, Any]:
        """The tool as a chat template reads it."""
        function = self.function.model_dump(exclude_none=True, exclude={"strict"})
        return {"type": "function", "function": {"parameters": {"type": "object", "properties": {}}, **function}}


class CalledFunction(StrictModel):
    """`arguments` are JSON, and an object from here on."""

    name: str
    arguments: Annotated[dict[str, Any], Field(default_factory=dict)]

    @field_validator("arguments", mode="before")
    @classmethod
    def _parse(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        try:
            value = json.loads(value) if value.strip() else {}
        except (ValueError, RecursionError):
            raise ValueError("is no JSON; expected an object in JSON") from None
        if not isinstance(value, dict):
            raise ValueError("is no object in JSON")
        return value


class ToolCall(StrictModel):
    """A call that an assistant has made."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


Calls = Annotated[list[ToolCall], Field(max_length=MAX_CALLS, fail_fast=True)]


def _choice(value: Any) -> str | None:
    """The choice, or the name of the one function."""
    if value is None or value in _CHOICES:
        return value
    function = value.get("function") if isinstance(value, Mapping) and value.get("type") == "function" else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        raise ValueError(f"is {named(value)}; {_EXPECTED_CHOICE}")
    return f"function:{name}"


class NamedFunction(StrictModel):
    """For OpenAPI: a function of `tools`."""

    name: str


class NamedChoice(StrictModel):
    """For OpenAPI: the choice of one function."""

    type: Literal["function"]
    function: NamedFunction


Choice = Annotated[
    str | None,
    PlainValidator(_choice, json_schema_input_type=Literal["none", "auto", "required"] | NamedChoice | None),
]


class ToolsRequest(StrictModel):
    """`tools` as the chat template gets them, for `/v1/chat/completions` and `/tokenize`."""

    tools: Annotated[list[Tool] | None, Field(max_length=MAX_TOOLS, fail_fast=True)] = None

    @model_validator(mode="after")
    def _check_names(self) -> "ToolsRequest":
        names = set()
        for position, tool in enumerate(self.tools or ()):
            if tool.function.name in names:
                raise RequestError(
                    f"tools[{position}].function.name is {tool.function.name!r}, as is that of another tool",
                    param=f"tools[{position}].function.name",
                )
            names.add(tool.function.name)
        return self

    def template_tools(self) -> list[dict[str, Any]] | None:
        """What the chat template gets; None for no tools."""
        return [tool.to_template() for tool in self.tools or ()] or None


class ToolChoiceRequest(ToolsRequest):
    """Which tools an answer may call, or has to."""

    tool_choice: Choice = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _check_choice(self) -> "ToolChoiceRequest":
        if self.tool_choice in (None, "none"):
            return self
        if not self.tools and self.tool_choice != "auto":
            raise RequestError("tool_choice asks for a call, but there are no tools", param="tool_choice")
        name = self._chosen
        if name is not None and name not in [tool.function.name for tool in self.tools or ()]:
            raise RequestError(
                f"tool_choice names {name[:MAX_NAME]!r}, which is none of the tools", param="tool_choice"
            )
        return self

    @property
    def _chosen(self) -> str | None:
        """The name of the one function that has to be called."""
        choice = self.tool_choice or ""
        return choice.removeprefix("function:") if choice.startswith("function:") else None

    @property
    def callable_tools(self) -> Tools | None:
        """Schemas of what may be called, by name; None where nothing may."""
        if not self.tools or self.tool_choice == "none":
            return None
        chosen = self._chosen
        return {
            tool.function.name: tool.function.parameters or {}
            for tool in self.tools
            if chosen in (None, tool.function.name)
        }

    def template_tools(self) -> list[dict[str, Any]] | None:
        """What the chat template gets: nothing where no tool may be called."""
        return None if self.tool_choice == "none" else super().template_tools()

    @property
    def must_call(self) -> bool:
        """Whether the answer has to call a tool."""
        return self.tool_choice == "required" or self._chosen is not None

    @property
    def calls_in_parallel(self) -> bool:
        """Whether an answer may have several calls. One function that has to be called is called once."""
        return self.parallel_tool_calls is not False and self._chosen is None

    def answer_form(self, form: AnswerForm) -> AnswerForm:
        """The form of this request's answers, of a model of that form. Raises `RequestError` without one for calls."""
        if self.callable_tools is None:
            return AnswerForm(form.reasoning)
        if self.must_call or (self._is_strict and form.calls != "none"):
            return AnswerForm(form.reasoning, form.forced_calls)
        if form.calls == "none":
            raise RequestError(
                "this model has no known form of tool calls; ask for a call with tool_choice, or start the server with "
                "--tool-call-parser",
                param="tools",
            )
        return form

    @property
    def _is_strict(self) -> bool:
        return any(tool.function.strict for tool in self.tools or ())

    def to_grammar(self, form: AnswerForm, special_id: SpecialId, opened: bool) -> StructuredOutputsParams | None:
        """What answers of that form are held to, so that calls fit; None where nothing asks for that."""
        tools = self.held_tools
        if tools is None:
            return None
        try:
            grammar = CallGrammar(form, tools, special_id, opened=opened, parallel=self.calls_in_parallel)
        except UnfitSchema as error:
            raise self.unfit(error.tool, str(error)) from None
        return StructuredOutputsParams(grammar=grammar.forced() if self.must_call else grammar.free(), param="tools")

    @property
    def held_tools(self) -> Tools | None:
        """Schemas that calls are held to, by the names of the tools; None where nothing asks for that."""
        tools = self.callable_tools
        if tools is None or not (self.must_call or self._is_strict):
            return None
        if self.must_call:
            return tools
        loose = [tool.function.name for tool in self.tools or () if not tool.function.strict]
        return {**tools, **dict.fromkeys(loose, ANY_ARGUMENTS)}

    def unfit(self, name: str, reason: str) -> RequestError:
        """What refuses the tool of that name, whose calls cannot be held to its schema."""
        position = [tool.function.name for tool in self.tools or ()].index(name)
        param = f"tools[{position}].function.parameters"
        return RequestError(f"{param} of {name!r} cannot be used: {reason}", param=param)
