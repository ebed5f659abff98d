"""The sandbox that chat templates run in: transformers' own, but texts know which characters the template wrote."""

import datetime
import functools
import inspect
import json
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.utils import Namespace

from emoe_jax.checkpoint.template_text import TemplateText

MAX_LITERALS = 4096


class _Generator(CodeGenerator):
    """Wraps the literals of a template; whatever else a template handles came with the request."""

    def visit_Const(self, node: nodes.Const, frame: Frame) -> None:
        value = node.as_const(frame.eval_ctx)
        if isinstance(value, str):
            self.write(_literal(value))
        else:
            super().visit_Const(node, frame)

    def visit_TemplateData(self, node: nodes.TemplateData, frame: Frame) -> None:
        self.write(_literal(node.data))

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.join((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def _output_const_repr(self, group: Iterable[Any]) -> str:
        return _literal("".join(group))


def _literal(text: str) -> str:
    return f"environment.literal({text!r})"


class _Generation(Extension):
    """`{% generation %}` tells trainers what the model said; here it is only a scope."""

    tags = {"generation"}  # noqa: RUF012  jinja's attribute

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_said"), [], [], body).set_lineno(line)

    def _said(self, caller: Callable[[], str]) -> str:
        return caller()


class _TemplateDict:
    """`dict` without its attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _TemplateNamespace(Namespace):
    """Jinja's, without names that begin with an underscore: they reach into Python."""

    def __init__(*args: Any, **kwargs: Any):  # `namespace(self=...)` is a template's right
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: str) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot have the attribute {name!r}")


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """What a template of this environment renders is a `TemplateText`. Safe to share between threads."""

    code_generator_class = _Generator

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # folding would hide literals inside lists from the generator
            finalize=TemplateText.of_value,
            extensions=[_Generation, LoopControlExtension],
        )
        self.literal = functools.lru_cache(MAX_LITERALS)(TemplateText.own)
        self.filters = {name: _filter(function) for name, function in self.filters.items()}
        self.filters["tojson"] = _to_json
        self.filters["safe"] = _filter(lambda value: value)  # nothing is escaped here
        self.globals["raise_exception"] = _raise
        self.globals["strftime_now"] = lambda format: datetime.datetime.now().strftime(format)
        self.globals["dict"] = _TemplateDict()
        self.globals["namespace"] = _TemplateNamespace

    concat = staticmethod(TemplateText.concat)  # pyright: ignore[reportAssignmentType]

    @staticmethod
    def join(values: Iterable[Any]) -> TemplateText:
        """The `~` of templates."""
        return TemplateText.concat(map(TemplateText.of_value, values))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """A method of a plain text runs as that of a `TemplateText`, as its arguments may be the template's."""
        owner = getattr(__obj, "__self__", None)
        if isinstance(__obj, types.BuiltinMethodType) and type(owner) is str:
            __obj = getattr(TemplateText(owner), __obj.__name__)
        return super().call(__context, __obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`'...{}'.format(...)`, which jinja runs in a sandbox of its own."""
        sandboxed = super().wrap_str_format(value)
        owner = getattr(value, "__self__", None)
        if sandboxed is None or not isinstance(owner, TemplateText):
            return sandboxed

        def wrapper(*args: Any, **kwargs: Any) -> str:
            text = sandboxed(*args, **kwargs)
            is_map = value.__name__ == "format_map"
            parts = _formatted(SandboxedFormatter(self), owner, () if is_map else args, args[0] if is_map else kwargs)
            result = TemplateText.concat(parts)
            return result if str.__eq__(result, text) else TemplateText(text)

        return wrapper


def _formatted(
    formatter: SandboxedFormatter, template: TemplateText, args: Any, kwargs: Mapping[str, Any]
) -> list[str]:
    """The parts of a text with fields filled in, as far as fields have no format of their own."""
    owned = TemplateText.own if b"\0" not in template.owned else TemplateText
    parts: list[str] = []
    position = 0
    for literal, field, spec, conversion in formatter.parse(template):
        parts.append(owned(literal))
        if field is None:
            continue
        if not field or field[0] in ".[":
            field, position = f"{position}{field}", position + 1
        value = formatter.convert_field(formatter.get_field(field, args, kwargs)[0], conversion)  # pyright: ignore[reportArgumentType]
        parts.append(format(value, spec) if spec else TemplateText.of_value(value))
    return parts


def _filter(function: Callable[..., Any]) -> Callable[..., Any]:
    """The filter, whose texts are `TemplateText`s. Its defaults, such as the "" that joins, are no message's."""
    parameters = inspect.signature(function).parameters
    texts = {name: p.default for name, p in parameters.items() if isinstance(p.default, str)}
    positions = list(parameters)

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        given = {*positions[: len(args)], *kwargs}
        kwargs |= {name: TemplateText.own(text) for name, text in texts.items() if name not in given}
        return function(*(TemplateText(arg) if type(arg) is str else arg for arg in args), **kwargs)

    return wrapper


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise TemplateError(message)
