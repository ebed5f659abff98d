"""Texts wait for the tokenizer within bounds, long ones apart from short ones, and not for clients that have left."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from emoe_jax.errors import RequestError
from emoe_jax.requests.structured_params import StructuredOutputsParams
from serve.lanes import GRAMMAR_BYTES, SHORT_BYTES, TEXT_BYTES, Room, TextLanes, size_of
from serve.refusals import QueueFull
from serve.text import GRAMMAR_THREADS, MIN_PIECE, PIECE_CHARS_PER_TOKEN, TextCodec
from tests.serve.conftest import StartServer
from tests.serve.fake import VOCAB_SIZE, FakeEngine, FakeTokenizer

BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "wait", "max_tokens": 2},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "wait"}], "max_tokens": 2},
    "/tokenize": {"prompt": "wait"},
    "/detokenize": {"tokens": [119, 97, 105, 116]},
}


class Waiting(FakeTokenizer):
    """A tokenizer that waits at the text `wait`, and notes what it has done."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.waits = threading.Event()
        self.go_on = threading.Event()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        self._at(text)
        return super().encode(text, add_special_tokens)

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        text = super().decode(ids)
        self._at(text)
        return text

    def _at(self, text: str) -> None:
        if "wait" in text:
            self.waits.set()
            assert self.go_on.wait(30)
        self.done.append(text)


@pytest.fixture
def tokenizer() -> Iterator[Waiting]:
    tokenizer = Waiting()
    yield tokenizer
    tokenizer.go_on.set()


@pytest.mark.parametrize("texts", [1, 3, 40])
def test_bytes_are_bounded(texts: int) -> None:
    lanes = TextLanes(max_waiting_bytes=texts * (1000 + TEXT_BYTES))
    full = pytest.raises(QueueFull, match=str(texts * (1000 + TEXT_BYTES)))
    with lanes.reserve(texts, texts * 1000), full, lanes.reserve(1, 1):
        pass
    with lanes.reserve(5, 10**9):  # alone, whatever its size
        pass
    with lanes.reserve(1, 0), lanes.reserve(texts - 1, (texts - 1) * 1000):
        pass
    lanes.close()


@pytest.mark.parametrize("text", ["", "plain", "äöü" * 9, "𝒳", "\ud800"])
def test_sizes_are_those_of_utf_8(text: str) -> None:
    assert size_of(text) == len(text.encode(errors="surrogatepass"))


def test_what_nobody_waits_for_is_not_done() -> None:
    async def scenario() -> None:
        lanes, go_on, done = TextLanes(), threading.Event(), []
        first = asyncio.ensure_future(lanes.run(1, lambda: go_on.wait(30)))
        others = [asyncio.ensure_future(lanes.run(1, lambda name=name: done.append(name))) for name in "abc"]
        await asyncio.sleep(0)
        others[1].cancel()
        await asyncio.sleep(0)
        go_on.set()
        await asyncio.gather(first, others[0], others[2])
        assert done == ["a", "c"]
        lanes.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("long", [SHORT_BYTES + 1, 10 * SHORT_BYTES])
def test_long_texts_hold_up_no_short_ones(long: int) -> None:
    async def scenario() -> None:
        lanes, go_on = TextLanes(), threading.Event()
        running = asyncio.ensure_future(lanes.run(long, lambda: go_on.wait(30)))
        waiting = asyncio.ensure_future(lanes.run(long, lambda: "long"))
        assert [await lanes.run(size, lambda: "short") for size in (0, 1, SHORT_BYTES)] == ["short"] * 3
        assert not running.done()
        go_on.set()
        assert (await running, await waiting) == (True, "long")
        lanes.close()

    asyncio.run(scenario())


@pytest.mark.parametrize(("context", "length"), [(2000, MIN_PIECE + 10), (600, MIN_PIECE + 1), (20_000, 9 * 20_000)])
def test_prompts_that_cannot_fit_are_not_tokenized_whole(context: int, length: int) -> None:
    """One piece is enough to see it."""
    lengths: list[int] = []

    class Noting(FakeTokenizer):
        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            lengths.append(len(text))
            return super().encode(text, add_special_tokens)

    codec = TextCodec(Noting(), VOCAB_SIZE, context)
    text, piece = "x" * length, max(MIN_PIECE, PIECE_CHARS_PER_TOKEN * context)
    messages = [{"role": "user", "content": text}]
    message = rf"it has more than \d+ tokens; this model's maximum context length is {context} tokens"
    with pytest.raises(RequestError, match=message):
        asyncio.run(codec.encode_all(["short", text]))
    with pytest.raises(RequestError, match=message):
        asyncio.run(codec.chat(messages))
    assert lengths == [5, piece, piece]
    assert len(asyncio.run(codec.encode(text))) == length + 1  # /tokenize counts what does not fit
    assert len(asyncio.run(codec.chat(messages, must_fit=False))) > length
    codec.close()


@pytest.mark.parametrize("path", list(BODIES))
def test_overload_is_refused_and_said(
    start_server: StartServer, tokenizer: Waiting, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one text is worked on, as many bytes wait as may, and the next request is refused on every path."""
    reserve, taken = Room.reserve, threading.Semaphore(0)

    @contextlib.contextmanager
    def counted(room: Room, items: int, size: int) -> Iterator[None]:
        with reserve(room, items, size):
            taken.release()
            yield

    monkeypatch.setattr(Room, "reserve", counted)
    with start_server(FakeEngine(tokenizer), max_waiting_bytes=3 * TEXT_BYTES) as client, ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(client.post, "/tokenize", json={"prompt": "wait"})]
        assert tokenizer.waits.wait(30)
        answers.append(pool.submit(client.post, path, json=BODIES[path]))
        assert taken.acquire(timeout=30)
        assert taken.acquire(timeout=30)
        refused = client.post(path, json=BODIES[path] | ({"prompt": "x" * 90} if "prompt" in BODIES[path] else {}))
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "queue_full"
        assert f"exceed {3 * TEXT_BYTES}" in refused.json()["error"]["message"]
        tokenizer.go_on.set()
        assert [answer.result().status_code for answer in answers] == [200, 200]
        assert client.post(path, json=BODIES[path]).status_code == 200


@pytest.mark.parametrize("path", list(BODIES))
def test_texts_of_clients_that_left_are_not_tokenized(start_server: StartServer, tokenizer: Waiting, path: str) -> None:
    body = {key: "left" if value == "wait" else value for key, value in BODIES[path].items()}
    body |= {"tokens": [108]} if "tokens" in body else {}
    body |= {"messages": [{"role": "user", "content": "left"}]} if "messages" in body else {}
    engine = FakeEngine(tokenizer)
    with start_server(engine) as client, ThreadPoolExecutor(1) as pool:
        first = pool.submit(client.post, "/tokenize", json={"prompt": "wait"})
        assert tokenizer.waits.wait(30)
        with pytest.raises(httpx.ReadTimeout):
            client.post(path, json=body, timeout=0.3)
        assert client.get("/health").status_code == 200  # the server has seen the connection close by now
        time.sleep(0.2)
        tokenizer.go_on.set()
        assert first.result().status_code == 200
        assert client.post("/tokenize", json={"prompt": "after"}).status_code == 200
    assert tokenizer.done == ["wait", "after"]
    assert engine.requests == []


def test_no_conversation_is_rendered_for_a_full_engine(start_server: StartServer) -> None:
    tokenizer = Waiting()
    engine = FakeEngine(tokenizer)
    engine.gate.clear()
    with start_server(engine, max_unfinished=4) as client, ThreadPoolExecutor(1) as pool:
        first = pool.submit(client.post, "/v1/completions", json={"prompt": "first", "max_tokens": 2})
        while not engine.requests:
            time.sleep(0.005)
        for n, status in ((4, 503), (5, 400)):
            body = {"messages": [{"role": "user", "content": "late"}], "n": n, "max_tokens": 2}
            assert client.post("/v1/chat/completions", json=body).status_code == status
        engine.gate.set()
        assert first.result().status_code == 200
    assert tokenizer.done == ["first"]


class WaitingGrammars:
    """Grammars that take until `go_on`, and what was compiled."""

    def __init__(self) -> None:
        self.begun: list[str | None] = []
        self.go_on = threading.Event()

    def compile(self, wanted: StructuredOutputsParams) -> object:
        self.begun.append(wanted.regex)
        assert self.go_on.wait(30)
        return wanted


GUIDED: dict[str, dict[str, Any]] = {path: body for path, body in BODIES.items() if path.startswith("/v1/")}


@pytest.mark.parametrize("path", list(GUIDED))
def test_grammars_wait_within_bounds_and_hold_up_no_one(start_server: StartServer, path: str) -> None:
    """As many are compiled as there are threads, one waits, the next is refused. All that time others get answers."""
    grammars, room = WaitingGrammars(), GRAMMAR_THREADS + 1

    def ask(regex: str) -> httpx.Response:
        return client.post(path, json=GUIDED[path] | {"guided_regex": regex}, timeout=30)

    engine = FakeEngine(FakeTokenizer())
    limit = room * (GRAMMAR_BYTES + 10)
    with start_server(engine, grammars=grammars, max_waiting_bytes=limit) as client, ThreadPoolExecutor(room) as pool:
        answers = [pool.submit(ask, f"a{number}") for number in range(room)]
        while len(grammars.begun) < GRAMMAR_THREADS:
            time.sleep(0.005)
        refused = ask("b" * 100)  # whether the third one has come by now or not
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "queue_full"
        assert "wait for the grammar compiler" in refused.json()["error"]["message"]
        assert len(grammars.begun) == GRAMMAR_THREADS
        assert client.post(path, json=GUIDED[path]).status_code == 200
        assert len(engine.requests) == 1  # the engine gets no request before its grammar is there
        grammars.go_on.set()
        assert [answer.result().status_code for answer in answers] == [200] * room
        assert ask("c" * 100).status_code == 200
    assert sorted(filter(None, grammars.begun)) == ["a0", "a1", "a2", "c" * 100]


def test_grammars_of_clients_that_left_are_not_compiled(start_server: StartServer) -> None:
    grammars = WaitingGrammars()
    engine = FakeEngine(FakeTokenizer())
    body = GUIDED["/v1/completions"]
    with start_server(engine, grammars=grammars) as client, ThreadPoolExecutor(GRAMMAR_THREADS) as pool:
        first = [
            pool.submit(client.post, "/v1/completions", json=body | {"guided_regex": f"a{number}"}, timeout=30)
            for number in range(GRAMMAR_THREADS)
        ]
        while len(grammars.begun) < GRAMMAR_THREADS:
            time.sleep(0.005)
        with pytest.raises(httpx.ReadTimeout):
            client.post("/v1/completions", json=body | {"guided_regex": "left"}, timeout=0.3)
        assert client.get("/health").status_code == 200  # the server has seen the connection close by now
        time.sleep(0.2)
        grammars.go_on.set()
        assert [answer.result().status_code for answer in first] == [200] * GRAMMAR_THREADS
        assert client.post("/v1/completions", json=body | {"guided_regex": "after"}).status_code == 200
    assert "left" not in grammars.begun
    assert len(engine.requests) == GRAMMAR_THREADS + 1


@pytest.mark.parametrize(("prompts", "n"), [(1, 5), (5, 1), (2, 2)])
def test_nothing_is_tokenized_for_a_full_engine(start_server: StartServer, prompts: int, n: int) -> None:
    tokenizer = Waiting()
    engine = FakeEngine(tokenizer)
    engine.gate.clear()
    body = {"prompt": "first", "max_tokens": 2}
    with start_server(engine, max_unfinished=4) as client, ThreadPoolExecutor(1) as pool:
        first = pool.submit(client.post, "/v1/completions", json=body)
        while not engine.requests:
            time.sleep(0.005)
        refused = client.post("/v1/completions", json={"prompt": ["late"] * prompts, "n": n, "max_tokens": 2})
        if prompts * n > 4:
            assert refused.status_code == 400
            assert refused.json()["error"]["param"] == ("prompt" if prompts > 4 else "n")
            assert "at most 4" in refused.json()["error"]["message"]
        else:
            assert refused.status_code == 503
            assert "1 sequences run or wait and 4 more came; at most 4" in refused.json()["error"]["message"]
        engine.gate.set()
        assert first.result().status_code == 200
    assert tokenizer.done == ["first"]
