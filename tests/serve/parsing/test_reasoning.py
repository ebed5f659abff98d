"""Thoughts told from answers: `<think>` blocks and harmony's channels."""

import pytest

from serve.parsing.answer_parser import AnswerParser
from serve.parsing.events import Text, Thought
from serve.parsing.forms import AnswerForm, form_of
from tests.serve.parsing.answers import Read, read

THINK, HARMONY = AnswerForm("think"), AnswerForm("harmony")
MAGISTRAL = str.maketrans("<>", "[]")
"""Turns the one pair of tags into the other, but for its letters."""


@pytest.mark.parametrize(
    ("text", "opened", "reasoning", "content"),
    [
        ("<think>2 + 2</think>4", False, "2 + 2", "4"),
        ("<think>\n2 + 2\n\nis 4\n</think>\n\n4\n", False, "2 + 2\n\nis 4", "4\n"),
        ("\n <think>a</think>b", False, "a", "b"),
        ("2 + 2\n</think>\n\n4", True, "2 + 2", "4"),
        ("<think>\n2 + 2</think>4", True, "2 + 2", "4"),
        ("<think>a</think>\n<think>b</think>c", False, "a\nb", "c"),
        ("<think></think>\n\n4", False, "", "4"),
        ("\n\n</think>\n\n4", True, "", "4"),
        ("<think>never closed", False, "never closed", ""),
        ("never closed </thin", True, "never closed </thin", ""),
        ("never closed\n", True, "never closed", ""),
        ("4", False, "", "4"),
        (" 4 ", False, "", " 4 "),
        ("Write <think> first, then </think>.", False, "", "Write <think> first, then </think>."),
        ("<thinking>a</thinking>", False, "", "<thinking>a</thinking>"),
        ("<think>a < b </ c</think>d", False, "a < b </ c", "d"),
        ("<think>a</think>b <think>c</think>", False, "a", "b <think>c</think>"),
        ("<thi", False, "", "<thi"),
        ("", False, "", ""),
        ("  ", False, "", "  "),
        ("", True, "", ""),
    ],
)
def test_think_blocks(text: str, opened: bool, reasoning: str, content: str) -> None:
    for pieces in ([text], list(text)):
        assert read(pieces, THINK, None, opened=opened) == Read(reasoning, content)
    said, *parts = (each.translate(MAGISTRAL).replace("think]", "THINK]") for each in (text, reasoning, content))
    for pieces in ([said], list(said)):
        assert read(pieces, AnswerForm("magistral"), None, opened=opened) == Read(parts[0], parts[1])


@pytest.mark.parametrize(
    ("text", "reasoning", "content"),
    [
        (
            "<|channel|>analysis<|message|>2 + 2<|end|><|start|>assistant<|channel|>final<|message|>4<|return|>",
            "2 + 2",
            "4",
        ),
        ("<|channel|>final<|message|>4", "", "4"),
        ("<|channel|>analysis<|message|>never closed", "never closed", ""),
        ("<|channel|>analysis<|message|>never closed<|en", "never closed<|en", ""),
        (
            "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>analysis<|message|>b<|end|>"
            "<|start|>assistant<|channel|>commentary<|message|>c<|end|><|start|>assistant<|channel|>final<|message|>d",
            "a\nb",
            "c\nd",
        ),
        ("<|channel|>analysis<|message|>a<|channel|>final<|message|>b", "a", "b"),
        ("<|channel|>analysis<|message|>a<|start|>assistant<|channel|>final<|message|>b", "a", "b"),
        ("<|channel|>final <|constrain|>json<|message|>{}", "", "{}"),
        ("<|channel|>final<|message|>a <| b |> <c", "", "a <| b |> <c"),
        ("<|channel|>ana", "", ""),
        ("<|channel|>final<|message|>a<|end|><|start|>assis", "", "a"),
        ('{"a": 1}', "", '{"a": 1}'),
        ("tomorrow", "", "tomorrow"),
        ("to", "", "to"),
        ("<|channel|>" + "x" * 600, "", "x" * 600),
        ("<|channel|>commentary to=functions.weather<|message|>{}<|call|>", "", "{}"),  # a tool that was not offered
    ],
)
def test_harmony_channels(text: str, reasoning: str, content: str) -> None:
    for pieces in ([text], list(text)):
        assert read(pieces, HARMONY, None) == Read(reasoning, content)


def test_text_is_held_back_only_while_it_may_be_a_tag() -> None:
    parser = AnswerParser(THINK)
    assert parser.feed("<thi") == []
    assert parser.feed("s is text") == [Text("<this is text")]
    assert parser.feed(" <") == [Text(" <")]
    parser = AnswerParser(THINK, opened=True)
    assert parser.feed("a < b </") == [Thought("a < b")]
    assert parser.feed("c") == [Thought(" </c")]
    parser = AnswerParser(HARMONY)
    assert parser.feed("<|channel|>final<|message|>a<") == [Text("a")]
    assert parser.feed("b") == [Text("<b")]


@pytest.mark.parametrize(
    ("tokens", "form", "opened", "count"),
    [
        (["<think>", "a", "b", "</think>", "\n", "c", "d"], THINK, False, 4),
        (["<", "think", ">", "a", "", "</", "think", ">", "c"], THINK, False, 8),
        (["a", "</think>", "c"], THINK, True, 2),
        (["a", "b", "c"], THINK, True, 3),
        (["a", "b", "c"], THINK, False, 0),
        (["<", "b", "c"], THINK, False, 0),
        (
            ["<|channel|>", "analysis", "<|message|>", "a", "<|end|>", "<|start|>", "assistant", "<|channel|>", "b"],
            HARMONY,
            False,
            5,
        ),
        (["a"], AnswerForm(), False, 0),
    ],
)
def test_tokens_of_reasoning_are_counted(tokens: list[str], form: AnswerForm, opened: bool, count: int) -> None:
    parser = AnswerParser(form, opened=opened)
    for token in tokens:
        parser.feed(token, 1)
    parser.finish()
    assert parser.reasoning_tokens == count


@pytest.mark.parametrize(
    ("template", "form"),
    [
        ("{{ content }}", AnswerForm()),
        ("<think>\n</think> <tool_call>\n{...}\n</tool_call>", AnswerForm("think", "hermes")),
        ("<tool_call>\n<function=example>", AnswerForm("none", "qwen-xml")),
        ("<think></think><tool_call><arg_key>", AnswerForm("think", "glm")),
        ("<think></think><｜tool▁calls▁begin｜><｜tool▁call▁begin｜>", AnswerForm("think", "deepseek")),
        ("[AVAILABLE_TOOLS] [TOOL_CALLS]", AnswerForm("none", "mistral")),
        ("[THINK][/THINK] [TOOL_CALLS]", AnswerForm("magistral", "mistral")),
        ("<|channel|>analysis<|message|> to=functions.", AnswerForm("harmony", "harmony")),
    ],
)
def test_a_template_says_the_form(template: str, form: AnswerForm) -> None:
    assert form_of("auto", "auto", template_writes=lambda text: text in template) == form
    assert form_of("none", "none", template_writes=lambda text: text in template) == AnswerForm()
    named = form_of("auto", "auto", ("harmony", "mistral"), lambda text: text in template)
    assert named == AnswerForm("harmony", "mistral")
