"""What numbers requests may have is stated by `SamplingParams`, and the HTTP server asks for the same."""

import math
from typing import Any

import pytest
from pydantic import ValidationError

from emoe_jax import SLO, RequestError, SamplingParams
from emoe_jax.option_fields import Bounds
from emoe_jax.requests.request import MILLISECONDS, SAMPLING_BOUNDS
from serve.schema import ChatRequest, CompletionRequest, SloRequest

ASKED = sorted(SAMPLING_BOUNDS.keys() - {"prompt_logprobs"})
"""Log probabilities of prompts are asked for with `echo`."""


params: Any = SamplingParams


def beyond(bounds: Bounds, kind: type) -> list[Any]:
    """Numbers just outside."""
    assert bounds.low is not None
    assert bounds.high is not None
    if kind is int:
        return [bounds.low - 1, bounds.high + 1]
    low = bounds.low if bounds.open_low else math.nextafter(bounds.low, -math.inf)
    return [low, math.nextafter(bounds.high, math.inf)]


def within(bounds: Bounds, kind: type) -> list[Any]:
    """The first and the last number inside."""
    assert bounds.low is not None
    assert bounds.high is not None
    return [math.nextafter(bounds.low, math.inf) if bounds.open_low else kind(bounds.low), kind(bounds.high)]


def test_every_number_of_a_request_is_bounded() -> None:
    assert len(ASKED) == 11
    assert all(None not in bounds[:2] for bounds, _ in SAMPLING_BOUNDS.values())


@pytest.mark.parametrize("name", sorted(SAMPLING_BOUNDS))
def test_parameters_are_within_their_bounds(name: str) -> None:
    bounds, kind = SAMPLING_BOUNDS[name]
    for value in within(bounds, kind):
        assert getattr(params(**{name: value}), name) == value
    others: list[Any] = [10**400, 10**9999, float("nan"), "1", True]
    for value in beyond(bounds, kind) + others:
        with pytest.raises(RequestError, match=rf"^{name} is .*; expected an? (number|integer) in [(\[]") as caught:
            params(**{name: value})
        assert caught.value.param == name


@pytest.mark.parametrize("name", ASKED)
def test_the_server_takes_what_the_engine_takes(name: str) -> None:
    bounds, kind = SAMPLING_BOUNDS[name]
    if name == "max_tokens":
        bounds = bounds._replace(low=0)  # with `echo`, which shows the prompt alone
    more: dict[str, Any] = {"prompt": "x", "echo": True}
    for value in within(bounds, kind):
        assert getattr(CompletionRequest(**more, **{name: value}), name) == value
    for value in beyond(bounds, kind):
        with pytest.raises(ValidationError, match=name):
            CompletionRequest(**more, **{name: value})


@pytest.mark.parametrize(("name", "field"), [("max_completion_tokens", "max_tokens"), ("top_logprobs", "logprobs")])
def test_names_of_chats_have_the_bounds_of_what_they_become(name: str, field: str) -> None:
    bounds, kind = SAMPLING_BOUNDS[field]
    more: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}], "logprobs": True}
    for value in within(bounds, kind):
        assert getattr(ChatRequest(**more, **{name: value}), name) == value
    for value in beyond(bounds, kind):
        with pytest.raises(ValidationError, match=name):
            ChatRequest(**more, **{name: value})


def test_deadlines_have_the_same_bounds() -> None:
    for value in within(MILLISECONDS, float):
        assert SLO(ttft_ms=value).ttft_ms == SloRequest(ttft_ms=value).ttft_ms == value
    for value in beyond(MILLISECONDS, float):
        with pytest.raises(RequestError, match=r"latency_ms is .*; expected a number in \(0, 1e\+09\]"):
            SLO(latency_ms=value)
        with pytest.raises(ValidationError, match="latency_ms"):
            SloRequest(latency_ms=value)
