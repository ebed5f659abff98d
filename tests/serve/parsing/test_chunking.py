"""What an answer says does not depend on where its pieces are cut."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.parsing.forms import TAGS, AnswerForm
from tests.serve.parsing.answers import read

FORMS = [
    AnswerForm("none", "none"),
    AnswerForm("think", "none"),
    AnswerForm("harmony", "none"),
    AnswerForm("harmony", "harmony"),
    AnswerForm("none", "harmony"),
    AnswerForm("think", "hermes"),
    AnswerForm("think", "qwen-xml"),
    AnswerForm("think", "glm"),
    AnswerForm("none", "deepseek"),
    AnswerForm("magistral", "mistral"),
    AnswerForm("harmony", "hermes"),
]
TAG = sorted({tag for tags in TAGS.values() for tag in tags})
WORDS = [
    *(
        "analysis",
        "final",
        "commentary",
        "assistant",
        " to=functions.weather",
        "functions.now",
        "to",
        "json",
        "weather",
    ),
    *("<tool_call>weather", "<arg_key>city</arg_key>", "<arg_value>", "function", "```json", "```"),
    *("<｜tool▁call▁begin｜>weather<｜tool▁sep｜>", "<｜tool▁call▁begin｜>function<｜tool▁sep｜>now"),
    *("<function=weather>", "<function=", "<parameter=city>", "<parameter=days>", "</parameter>", "</function>", ">"),
    *(
        '{"name": "weather"',
        '"arguments": {',
        ', "arguments": ',
        '{"city": "Oslo"}',
        '{"name": "now", "arguments": {}}',
    ),
    *('{"name": "weather", "arguments": {"city": "a\\"</tool_call>"}}', "}", "{", "[", "]", ",", '"', "\\", ":", "7"),
    *(" ", "\n", "x", "é", "<", "</", "<|", "null"),
]
ANSWER = st.lists(st.sampled_from([*TAG, *WORDS]), max_size=14).map("".join)


@pytest.mark.parametrize("form", FORMS, ids=str)
@settings(max_examples=120, deadline=None, derandomize=True)
@given(data=st.data())
def test_pieces_say_what_the_whole_says(form: AnswerForm, data: st.DataObject) -> None:
    text = data.draw(ANSWER)
    opened = data.draw(st.booleans())
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=6)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = read([text], form, opened=opened)
    assert read(list(text), form, opened=opened) == whole
    assert read(pieces, form, opened=opened) == whole
