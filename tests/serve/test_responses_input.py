"""Items of `/v1/responses` as the messages of a chat."""

from typing import Any

from serve.reader import INVALID_JSON
from serve.responses.input import ITEMS, conversation


def test_what_an_assistant_does_in_a_row_is_one_message() -> None:
    def thought(text: str) -> dict[str, Any]:
        return {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": text}]}

    def call(call_id: str, arguments: str) -> dict[str, Any]:
        return {"type": "function_call", "call_id": call_id, "name": "f", "arguments": arguments}

    result = {"type": "function_call_output", "call_id": "b", "output": [{"type": "input_text", "text": "7"}]}
    summed = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "in short"}]}
    said = {"role": "assistant", "content": "I look."}
    items = [
        thought("so"),
        thought("well"),
        said,
        call("a", '{"x": "1'),
        call("b", "?"),
        result,
        summed,
        said,
        thought("hm"),
    ]
    assert conversation(ITEMS.validate_python(items), "be kind") == [
        {"role": "system", "content": "be kind"},
        {
            "role": "assistant",
            "content": "I look.",
            "reasoning_content": "so\nwell",
            "tool_calls": [
                {"id": "a", "function": {"name": "f", "arguments": {"x": "1"}}},
                {"id": "b", "function": {"name": "f", "arguments": {INVALID_JSON: "?"}}},
            ],
        },
        {"role": "tool", "tool_call_id": "b", "name": "f", "content": "7"},
        {"role": "assistant", "content": "I look.", "reasoning_content": "in short"},
        {"role": "assistant", "content": "", "reasoning_content": "hm"},
    ]
