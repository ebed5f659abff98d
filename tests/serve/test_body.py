"""How bodies are read: bounded in bytes, in what they hold, in time, and all together."""

import asyncio
import itertools
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.errors import ApiError
from serve.http import body
from serve.http.body import BRACKET_MARKS, MAX_MARKS, BodyReader, JsonRequest, Marks
from serve.schema import CompletionRequest

TEXT = st.text(st.sampled_from(list('\\",:[]{}aé\n')), max_size=8)
VALUE = st.recursive(TEXT | st.integers() | st.booleans(), lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner))


def marks_of(value: Any) -> int:
    """By walking the value: of its texts the quotes only."""
    if isinstance(value, str):
        return 2
    if isinstance(value, list):
        return BRACKET_MARKS + max(0, len(value) - 1) + sum(map(marks_of, value))
    if isinstance(value, dict):
        return BRACKET_MARKS + max(0, len(value) - 1) + sum(3 + marks_of(item) for item in value.values())
    return 0


@settings(max_examples=50, deadline=None)
@given(value=VALUE, ascii_only=st.booleans(), cuts=st.lists(st.integers(0, 200)))
def test_marks_are_those_outside_of_texts(value: Any, ascii_only: bool, cuts: list[int]) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only).encode()
    marks = Marks()
    for begin, end in itertools.pairwise(sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})):
        marks.add(text[begin:end])
    assert marks.count == marks_of(value)


async def pieces(*content: bytes, then: float = 0.0) -> AsyncIterator[bytes]:
    for piece in content:
        yield piece
        await asyncio.sleep(0)
    await asyncio.sleep(then)


def refusal(reader: BodyReader, *content: bytes) -> ApiError:
    with pytest.raises(ApiError) as error:
        asyncio.run(reader.read(pieces(*content)))
    return error.value


def test_too_many_marks_are_refused_before_they_are_read() -> None:
    reader = BodyReader(30)
    assert asyncio.run(reader.read(pieces(b"," * MAX_MARKS))) == b"," * MAX_MARKS
    assert asyncio.run(reader.read(pieces(b'"', b"," * 2 * MAX_MARKS, b'"'))) == b'"' + b"," * 2 * MAX_MARKS + b'"'
    assert refusal(reader, b"," * MAX_MARKS, b",").status_code == 413
    assert refusal(reader, b"[" * 2**20, *[b"[" * 2**20] * 40).status_code == 413


def test_a_slow_body_is_refused() -> None:
    async def scenario() -> None:
        with pytest.raises(ApiError) as error:
            await BodyReader(0.05).read(pieces(b"{", then=5))
        assert error.value.status_code == 408
        assert error.value.headers == {"connection": "close"}

    asyncio.run(scenario())


def test_what_all_bodies_may_take_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """While large ones are half sent, small ones are still read; afterwards all are."""
    monkeypatch.setattr(body, "MAX_HELD_BYTES", 2**20)
    large, small = b"x" * 2**19, b"x" * 2**10

    async def scenario() -> None:
        reader = BodyReader(30)
        halves = [asyncio.ensure_future(reader.read(pieces(large, then=60))) for _ in range(2)]
        await asyncio.sleep(0.01)
        with pytest.raises(ApiError) as error:
            await reader.read(pieces(large))
        assert error.value.status_code == 503
        assert (error.value.headers or {})["retry-after"]
        assert await reader.read(pieces(small)) == small
        for half in halves:
            half.cancel()
        await asyncio.wait(halves)
        assert await reader.read(pieces(large, large)) == 2 * large

    asyncio.run(scenario())


DEEP = b"[" * 99 + b"]" * 99
LARGE = {
    "text": b'{"prompt": "' + b"x" * (8 * 2**20 - 100) + b'"}',
    "escapes": b'{"prompt": "' + rb"\u1234" * (8 * 2**20 // 6 - 100) + b'"}',
    "ids": json.dumps({"prompt": [12345] * (MAX_MARKS - 100)}).encode(),
    "lists": b'{"prompt": "hi", "x": [' + b",".join([DEEP] * (MAX_MARKS // 99 // BRACKET_MARKS - 2)) + b"]}",
    "fields": json.dumps({"prompt": "hi", **dict.fromkeys(map(str, range(MAX_MARKS // 4 - 100)), 1)}).encode(),
}
"""What takes longest, but is within the bounds."""


@pytest.mark.parametrize("name", list(LARGE))
def test_what_is_within_the_bounds_is_checked_in_a_moment(name: str) -> None:
    """For so long streams stand still. The best of several tries, as the machine may be busy with something else."""
    content = asyncio.run(BodyReader(30).read(pieces(LARGE[name])))
    request = JsonRequest({"type": "http", "headers": []})
    request._body = content  # pyright: ignore[reportPrivateUsage]
    best = float("inf")
    for _ in range(20):
        began = time.thread_time()
        CompletionRequest.model_validate(asyncio.run(request.json()))
        best = min(best, time.thread_time() - began)
        if best < 0.05:
            break
    assert best < 0.1
