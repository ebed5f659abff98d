"""Grammars of calls, in llguidance: what they let through is what the parser reads as a call that fits."""

from pathlib import Path
from typing import Any

import pytest

from emoe_jax import StructuredOutputsParams
from emoe_jax.checkpoint import Tokenizer
from emoe_jax.errors import RequestError
from emoe_jax.requests.grammar import Grammars
from serve.options import DEMO_MODEL
from serve.parsing.call_grammar import CallGrammar
from serve.parsing.forms import AnswerForm
from tests.serve.parsing.answers import loaded, read
from tests.serve.parsing.call_cases import CITY as CITY_TEXT
from tests.serve.parsing.call_cases import bare_deepseek, deepseek, one_deepseek

CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS: dict[str, Any] = {"weather": CITY, 'a"b': {}}
MARKS = {"<|channel|>": 2, "<|message|>": 3, "<|end|>": 4, "<|start|>": 5, "<|constrain|>": 6}
"""Tokens that stand for harmony's, of a tokenizer that has others."""


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    tokenizer = Tokenizer.load(Path(DEMO_MODEL), None)
    assert tokenizer is not None
    return Grammars(tokenizer, tokenizer.backend.vocab_size, tokenizer.eos_token_ids)


def allows(grammars: Grammars, grammar: str, text: str) -> bool:
    """Whether the text may be a whole answer."""
    matcher = grammars.compile(StructuredOutputsParams(grammar=grammar, param="tools")).copy()
    tokens = grammars.vocabulary.tokenize_str(text)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


def tagged(*calls: str) -> str:
    return "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in calls)


OSLO = '{"name": "weather", "arguments": {"city": "Oslo"}}'
OTHER = '{"name": "a\\"b", "arguments": {"x": [1]}}'
MISSPELT = '{"name": "weather", "arguments": {"town": "Oslo"}}'


@pytest.mark.parametrize(
    ("form", "options", "right", "wrong"),
    [
        (
            AnswerForm("none", "hermes"),
            {},
            [tagged(OSLO), tagged(OTHER), tagged(OSLO, OTHER)],
            ["", "hi", "hi " + tagged(OSLO), tagged(MISSPELT), tagged(OSLO)[:-3], tagged(*[OSLO] * 17)],
        ),
        (AnswerForm("none", "hermes"), {"parallel": False}, [tagged(OSLO)], [tagged(OSLO, OTHER)]),
        (
            AnswerForm("think", "hermes"),
            {},
            [tagged(OSLO), "<think>a < b</think>" + tagged(OSLO), "<think>\na\n</think>\n\n" + tagged(OSLO)],
            ["<think>a</think>", "<think>a", "a</think>" + tagged(OSLO)],
        ),
        (
            AnswerForm("think", "hermes"),
            {"opened": True},
            ["a < b</think>" + tagged(OSLO)],
            [tagged(OSLO), "<tool_call>", "a</think>hi"],
        ),
        (
            AnswerForm("none", "mistral"),
            {},
            [f"[TOOL_CALLS][{OSLO}]", f"[TOOL_CALLS][{OSLO}, {OTHER}]"],
            [f"[TOOL_CALLS][{MISSPELT}]", "[TOOL_CALLS][]", "[TOOL_CALLS]", "hi", f"[TOOL_CALLS]{OSLO}"],
        ),
        (
            AnswerForm("magistral", "mistral"),
            {},
            [f"[TOOL_CALLS][{OSLO}]", f"[THINK]a [ b[/THINK][TOOL_CALLS][{OSLO}]"],
            ["[THINK]a[/THINK]", f"<think>a</think>[TOOL_CALLS][{OSLO}]"],
        ),
        (
            AnswerForm("think", "deepseek"),
            {},
            [deepseek(one_deepseek(CITY_TEXT)), f"<think>a</think>{deepseek(*[bare_deepseek(CITY_TEXT)] * 2)}"],
            ["hi", one_deepseek(CITY_TEXT), deepseek(), deepseek(bare_deepseek('{"town": "Oslo"}'))],
        ),
        (
            AnswerForm("none", "deepseek"),
            {"parallel": False},
            [deepseek(bare_deepseek(CITY_TEXT))],
            [deepseek(*[bare_deepseek(CITY_TEXT)] * 2)],
        ),
        (
            AnswerForm("none", "mistral"),
            {"parallel": False},
            [f"[TOOL_CALLS][{OSLO}]"],
            [f"[TOOL_CALLS][{OSLO}, {OSLO}]"],
        ),
    ],
)
def test_forced_calls(grammars: Grammars, form: AnswerForm, options: Any, right: list[str], wrong: list[str]) -> None:
    grammar = CallGrammar(form, TOOLS, lambda tag: None, **options).forced()
    for text in right:
        assert allows(grammars, grammar, text), text
        calls = loaded(read([text], form, TOOLS, opened=options.get("opened", False)))
        assert calls
        assert all(name == 'a"b' or list(arguments) == ["city"] for name, arguments in calls)
    assert not [text for text in wrong if allows(grammars, grammar, text)]


@pytest.mark.parametrize(
    ("form", "options", "right", "wrong"),
    [
        (
            AnswerForm("none", "hermes"),
            {},
            ["hi <tool", tagged(OSLO), f"hi {tagged(OSLO, OTHER)} bye", "<think>a</think>" + tagged(OSLO)],
            [tagged(MISSPELT), "hi " + tagged(OSLO, MISSPELT), "<tool_call>"],
        ),
        (AnswerForm("none", "hermes"), {"parallel": False}, ["hi", tagged(OSLO)], [tagged(MISSPELT)]),
        (
            AnswerForm("think", "hermes"),
            {"opened": True},
            ["a <tool_call> b</think>" + tagged(OSLO), "a</think>hi"],
            ["a", "a</think>" + tagged(MISSPELT)],
        ),
        (AnswerForm("none", "mistral"), {}, ["hi", f"hi[TOOL_CALLS][{OSLO}]"], [f"[TOOL_CALLS][{MISSPELT}]"]),
        (
            AnswerForm("none", "deepseek"),
            {},
            ["hi", f"hi {deepseek(one_deepseek(CITY_TEXT))} bye"],
            [f"hi {deepseek(one_deepseek('{}'))}"],
        ),
    ],
)
def test_free_answers_whose_calls_fit(
    grammars: Grammars, form: AnswerForm, options: Any, right: list[str], wrong: list[str]
) -> None:
    grammar = CallGrammar(form, TOOLS, lambda tag: None, **options).free()
    assert [text for text in right if not allows(grammars, grammar, text)] == []
    assert [text for text in wrong if allows(grammars, grammar, text)] == []


def harmony(grammars: Grammars, text: str) -> list[int]:
    """Tokens of a text with `@c`, `@m`, `@e`, `@s` and `@j` for its tags."""
    marks = dict(zip("cmesj", MARKS.values(), strict=True))
    first, *rest = text.split("@")
    tokens = grammars.vocabulary.tokenize_str(first)
    for part in rest:
        tokens += [marks[part[0]], *grammars.vocabulary.tokenize_str(part[1:])]
    return tokens


@pytest.mark.parametrize(
    ("kind", "right", "wrong"),
    [
        (
            "forced",
            ["", "@canalysis@ma < b@e@sassistant"],
            ["@cfinal@mhi", "@ccommentary@mhi@e@sassistant"],
        ),
        ("free", ["", "@canalysis@ma@e@sassistant@ccommentary@mhi@e@sassistant"], ["@canalysis@ma@sassistant"]),
    ],
)
def test_harmony(grammars: Grammars, kind: str, right: list[str], wrong: list[str]) -> None:
    written = CallGrammar(AnswerForm("harmony", "harmony"), TOOLS, MARKS.get)
    grammar = written.forced() if kind == "forced" else written.free()
    start = grammars.compile(StructuredOutputsParams(grammar=grammar, param="tools"))

    def accepts(text: str) -> bool:
        matcher, tokens = start.copy(), harmony(grammars, text)
        return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()

    call = '@ccommentary to=functions.weather @jjson@m{"city": "Oslo"}'
    for before in right:
        assert accepts(before + call)
        assert not accepts(before + call.replace("city", "town"))
        assert not accepts(before + call.replace("weather", "now"))
    assert not any(accepts(before + call) for before in wrong)
    assert accepts("@cfinal@mhi") == (kind == "free")


def test_named_form_of_mistral(grammars: Grammars) -> None:
    ids = {"[TOOL_CALLS]": 2, "[ARGS]": 3}
    grammar = CallGrammar(AnswerForm("none", "mistral"), TOOLS, ids.get).forced()
    start = grammars.compile(StructuredOutputsParams(grammar=grammar, param="tools"))
    for arguments, fits in (('{"city": "Oslo"}', True), ('{"town": "Oslo"}', False)):
        matcher = start.copy()
        tokens = [2, *grammars.vocabulary.tokenize_str("weather"), 3, *grammars.vocabulary.tokenize_str(arguments)]
        assert (matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()) is fits


def test_schemas_that_no_grammar_can_have_are_refused(grammars: Grammars) -> None:
    for schema in ({"type": "object", "properties": {"x": {"type": "thing"}}}, {"multipleOf": 1000003}):
        grammar = CallGrammar(AnswerForm("none", "hermes"), {"f": schema}, lambda tag: None).forced()
        with pytest.raises(RequestError, match="tools cannot be used"):
            grammars.compile(StructuredOutputsParams(grammar=grammar, param="tools"))
    with pytest.raises(ValueError, match="oneOf"):
        CallGrammar(AnswerForm("none", "hermes"), {"f": {"oneOf": [{}, {}]}}, lambda tag: None)
