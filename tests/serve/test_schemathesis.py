"""Requests made from the server's own OpenAPI description, valid and not: none is a server error."""

from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings

schemathesis = pytest.importorskip("schemathesis", reason="needs the clients extra", exc_type=ImportError)

EXAMPLES = 80
WITHOUT_BODY = 20
OPERATIONS = (
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/messages"),
    ("POST", "/v1/messages/count_tokens"),
    ("POST", "/v1/responses"),
    ("GET", "/v1/responses/{response_id}"),
    ("DELETE", "/v1/responses/{response_id}"),
    ("GET", "/v1/responses/{response_id}/input_items"),
    ("POST", "/v1/responses/{response_id}/cancel"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{model}"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/health"),
    ("GET", "/v1/health"),
    ("GET", "/ready"),
    ("GET", "/metrics"),
    ("GET", "/v1/emoe/replicas"),
    ("GET", "/v1/emoe/state"),
)


def _has_body(method: str, path: str) -> bool:
    return method == "POST" and not path.endswith("/cancel")


@pytest.fixture(scope="module")
def described(client: httpx.Client) -> Any:
    return schemathesis.openapi.from_url(f"{client.base_url}/openapi.json")


def test_all_operations_are_tried(described: Any) -> None:
    found = {(operation.method.upper(), operation.path) for operation in map(_ok, described.get_all_operations())}
    assert found == set(OPERATIONS)


def _ok(result: Any) -> Any:
    return result.ok()


@pytest.mark.parametrize(
    ("mode", "method", "path"),
    [("POSITIVE", *operation) for operation in OPERATIONS]
    + [("NEGATIVE", *operation) for operation in OPERATIONS if _has_body(*operation)],
)
def test_no_operation_fails(described: Any, client: httpx.Client, mode: str, method: str, path: str) -> None:
    """Valid requests may still ask for too much, so that any status below 500 is an answer. Without a body there is
    nothing to get wrong.
    """
    operation = described[path][method]
    assert bool(operation.body) == _has_body(method, path)
    strategy = operation.as_strategy(generation_mode=schemathesis.GenerationMode[mode])

    @settings(
        max_examples=EXAMPLES if operation.body else WITHOUT_BODY,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
    )
    @given(case=strategy)
    def check(case: Any) -> None:
        answer = case.call(base_url=str(client.base_url))
        assert answer.status_code < 500, answer.text
        assert answer.headers["x-request-id"]

    check()
    assert client.get("/health").status_code == 200
