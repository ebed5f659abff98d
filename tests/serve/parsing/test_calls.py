"""Calls of tools, read from answers whole and a character at a time."""

import json
import time
from typing import Any

import pytest

from serve.parsing.answer_parser import AnswerParser
from serve.parsing.events import CallArguments, CallBegun, Text
from serve.parsing.forms import AnswerForm
from tests.serve.parsing.answers import TOOLS, read
from tests.serve.parsing.call_cases import BOTH, CASES, DEEPSEEK, GLM, HARMONY, HERMES, MISTRAL, XML, Case, call


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_whole_and_streamed_alike(case: Case) -> None:
    _, form, text, content, calls = case
    answers = [
        read([text], form),
        read(list(text), form),
        read([text[i : i + 3] for i in range(0, len(text), 3)], form),
    ]
    assert answers[0] == answers[1] == answers[2]
    assert answers[0].content == content
    assert [name for name, _ in answers[0].calls] == [name for name, _ in calls]
    for (_, written), (_, expected) in zip(answers[0].calls, calls, strict=True):
        assert (written if isinstance(expected, str) else json.loads(written)) == expected


def test_there_are_cases_of_every_form() -> None:
    assert len(CASES) >= 50
    assert {case[1] for case in CASES} == {HERMES, BOTH, XML, GLM, DEEPSEEK, MISTRAL, HARMONY}
    assert len({case[0] for case in CASES}) == len(CASES)


def test_what_is_no_call_keeps_every_character() -> None:
    for name, form, text, _, calls in CASES:
        if not calls and form != HARMONY:
            assert read(list(text), form).content == text, name


@pytest.mark.parametrize("form", [AnswerForm("think"), HERMES])
def test_without_tools_or_form_calls_are_text(form: AnswerForm) -> None:
    assert read([call("{}", "now")], form, None if form == HERMES else TOOLS).content == call("{}", "now")


def test_a_call_is_told_as_it_comes() -> None:
    parser = AnswerParser(HERMES, TOOLS)
    assert parser.feed('I look. <tool_call>{"name": "wea') == [Text("I look.")]
    assert parser.feed('ther", "arguments": {') == []
    assert parser.feed('"ci') == [CallBegun(0, "weather"), CallArguments(0, '{"ci')]
    assert parser.feed('ty": "Os') == [CallArguments(0, 'ty": "Os')]
    assert parser.feed('lo"}}</tool_call>') == [CallArguments(0, 'lo"}')]
    assert parser.finish() == []


def test_text_parameters_are_told_as_they_come() -> None:
    parser = AnswerParser(XML, TOOLS)
    assert parser.feed("<tool_call><function=weather>") == [CallBegun(0, "weather")]
    assert parser.feed("<parameter=city>\nOs") == [CallArguments(0, '{"city": "Os')]
    assert parser.feed('"lo\n</para') == [CallArguments(0, '\\"lo')]
    assert parser.feed("meter><parameter=days>1") == [CallArguments(0, '", "days": ')]
    assert parser.feed("2</parameter></function>") == [CallArguments(0, "12}")]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_a_forced_answer_that_is_cut_says_no_markup(case: Case) -> None:
    """The server holds such answers to calls: wherever the limit cuts one, what has begun is a call or nothing."""
    _, form, text, content, calls = case
    if content or not calls or '"Os' in str(calls):
        return  # as no grammar lets it be, or cut already
    for end in range(len(text)):
        answer = read([text[:end]], form, forced=True)
        assert answer.content in ("", "I look.")
        assert answer == read(list(text[:end]), form, forced=True)
        assert [name for name, _ in answer.calls] == [name for name, _ in calls][: len(answer.calls)]


def test_only_the_first_call_counts_where_calls_are_not_parallel() -> None:
    text = f"{call(chr(123) + chr(125), 'now')}{call(chr(123) + chr(125), 'now')} bye"
    assert read(list(text), HERMES, parallel=False) == ("", " bye", (("now", "{}"),))


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (HERMES, '<tool_call>{"a":[' * 3000 + "]" * 6000 + "!"),
        (HERMES, "<tool_call>" * 5000),
        (XML, "<tool_call><function=" * 3000),
        (MISTRAL, "[TOOL_CALLS][" * 5000),
        (GLM, "<tool_call>weather<arg" * 3000),
        (GLM, "<tool_call>rm\n<arg_key>" * 3000),
        (DEEPSEEK, "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>" * 2000),
        (DEEPSEEK, f"<｜tool▁call▁begin｜>{' ' * 20000}" * 3),
        (HARMONY, "<|channel|>" * 5000),
        (BOTH, "<think>" + "</thin" * 8000),
    ],
)
def test_answers_that_are_hard_to_read_take_no_long_time(form: AnswerForm, text: str) -> None:
    """Streams of others wait meanwhile. What tries each tag anew to the end would take minutes."""
    began = time.process_time()
    answer: Any = read([text[i : i + 5] for i in range(0, len(text), 5)], form)
    assert time.process_time() - began < 20
    assert not answer.calls
