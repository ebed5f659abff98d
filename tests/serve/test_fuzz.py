"""No JSON value in any field makes the server fail."""

from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve.errors import ErrorResponse, MessagesError
from serve.messages.schema import MessagesRequest
from serve.responses.schema import ResponsesRequest
from serve.schema import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest

VALID: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "hi", "max_tokens": 2},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2},
    "/v1/messages": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2},
    "/v1/responses": {"input": "hi", "max_output_tokens": 2},
    "/tokenize": {"prompt": "hi"},
    "/detokenize": {"tokens": [104, 105]},
}
SCHEMAS = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatRequest,
    "/v1/messages": MessagesRequest,
    "/v1/responses": ResponsesRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-2, 3)
    | st.sampled_from([2**31, 2**63, 2**64, -(2**63) - 1, 10**30])
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
)
NAMES = st.sampled_from(["role", "content", "type", "text", "task", "routing", "slo", "ttft_ms", "include_usage", "x"])
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=4))


@pytest.mark.parametrize("path", list(VALID))
@settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_value_is_answered(client: httpx.Client, path: str, data: st.DataObject) -> None:
    schema = SCHEMAS[path]
    fields = sorted({*schema.model_fields, *getattr(schema, "refused", ()), "unknown"})
    changes = data.draw(st.dictionaries(st.sampled_from(fields), JSON, min_size=1, max_size=3))
    response = client.post(path, json={**VALID[path], **changes})
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code != 200:
        (MessagesError if path == "/v1/messages" else ErrorResponse).model_validate_json(response.text)
