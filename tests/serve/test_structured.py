"""What answers have to match: the names that a request may use for it, and what is refused."""

import json
from typing import Any

import httpx
import pytest

from emoe_jax import StructuredOutputsParams
from tests.serve.conftest import StartServer
from tests.serve.fake import FakeEngine, FakeTokenizer

SCHEMA: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "boolean"}}}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "hi", "max_tokens": 2},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2},
}


@pytest.mark.parametrize("path", list(BODIES))
@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, StructuredOutputsParams(json_object=True)),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "strict": True, "schema": SCHEMA},
                }
            },
            StructuredOutputsParams(json=SCHEMA),
        ),
        ({"structured_outputs": {"json": SCHEMA}}, StructuredOutputsParams(json=SCHEMA)),
        ({"structured_outputs": {"choice": ["a", "b"]}}, StructuredOutputsParams(choice=("a", "b"))),
        ({"structured_outputs": {"json_object": True}}, StructuredOutputsParams(json_object=True)),
        ({"guided_json": json.dumps(SCHEMA)}, StructuredOutputsParams(json=SCHEMA)),
        ({"guided_regex": "a+", "response_format": {"type": "text"}}, StructuredOutputsParams(regex="a+")),
        ({"guided_choice": ["a"]}, StructuredOutputsParams(choice=("a",))),
        ({"guided_grammar": 'start: "a"'}, StructuredOutputsParams(grammar='start: "a"')),
        ({"structured_outputs": {"grammar": 'root ::= "a"'}}, StructuredOutputsParams(grammar='root ::= "a"')),
    ],
)
def test_all_names_reach_the_engine(
    start_server: StartServer, path: str, body: dict[str, Any], expected: StructuredOutputsParams | None
) -> None:
    engine = FakeEngine(FakeTokenizer())
    with start_server(engine) as client:
        answer = client.post(path, json={**BODIES[path], **body})
    assert answer.status_code == 200, answer.text
    assert engine.requests[0]["params"].structured_outputs == expected


@pytest.mark.parametrize("path", list(BODIES))
@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.schema"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"grammar": 5}}, "structured_outputs.grammar"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": {"enum": ["x" * 100_000]}}, "guided_json"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": ["a"] * 5000}, "guided_choice"),
        ({"guided_regex": "a", "guided_json": {}}, "guided_regex"),
        ({"guided_grammar": ["x"]}, "guided_grammar"),
        ({"guided_grammar": "x" * 100_000}, "guided_grammar"),
        ({"guided_grammar": "x", "response_format": {"type": "json_object"}}, "guided_grammar"),
    ],
)
def test_bad_values_name_their_field(client: httpx.Client, path: str, body: dict[str, Any], param: str) -> None:
    answer = client.post(path, json={**BODIES[path], **body})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == param
    assert "\n" not in error["message"]
    assert len(error["message"]) < 400
