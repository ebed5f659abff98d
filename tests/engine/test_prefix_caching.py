"""What earlier requests computed is used again, and changes no token."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import nnx

from emoe_jax import Engine, RequestOutput, SamplingParams
from emoe_jax.device.dispatcher import Dispatched, Dispatcher
from emoe_jax.errors import RequestError
from emoe_jax.models import save_checkpoint
from emoe_jax.requests.contract import RoutingContract
from emoe_jax.scheduling.plan import StepPlan
from emoe_jax.traces import RoutingTrace
from tests.engines import RESIDENT, TINY, EngineFactory, random_model
from tests.golden.tiny import OPENMOE, write_checkpoint

GREEDY = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
OPTIONS: dict[str, Any] = {"policy": "static", "max_num_seqs": 2, "max_num_batched_tokens": 64} | RESIDENT
CACHED = [32, 32, 16, 16]
RNG = np.random.default_rng(5)


def drawn(count: int) -> list[int]:
    return RNG.integers(3, 60, size=count).tolist()


def prompts() -> list[list[int]]:
    """Unseen ones. After the first, `CACHED` of their tokens are known: pages are of 16, and the last is computed."""
    first = drawn(40)
    return [first, first[:33], [*first[:20], *drawn(20)], first[:32]]


def answer(engine: Engine, prompt: list[int], params: SamplingParams = GREEDY, **options: Any) -> RequestOutput:
    return engine.generate(prompt, params, **options)[0]


@pytest.fixture(scope="module")
def engine(tiny_checkpoint: Path) -> Iterator[Engine]:
    """All experts resident."""
    with Engine.load(tiny_checkpoint, expert_memory="100%", **OPTIONS) as engine:
        yield engine


@pytest.fixture(scope="module")
def plain(engine_of: EngineFactory) -> Engine:
    """The same without reuse."""
    return engine_of(expert_memory="100%")


def test_tokens_are_those_without_reuse(engine: Engine, plain: Engine) -> None:
    before = engine.state()["scheduler"]
    asked = prompts()
    answer(engine, asked[0])
    alone = [answer(engine, prompt) for prompt in asked]
    together = engine.generate(asked, GREEDY)
    expected = [answer(plain, prompt).token_ids for prompt in asked]
    for outputs in (alone, together):
        assert [output.token_ids for output in outputs] == expected
        assert [output.num_cached_tokens for output in outputs[:2]] == CACHED[:2]
    assert [output.num_cached_tokens for output in alone] == CACHED
    assert [output.num_cached_tokens for output in together] == [32, 32, 32, 16]
    scheduler = engine.state()["scheduler"]
    tokens = len(asked[0]) + 2 * sum(map(len, asked))
    assert scheduler["prefix_query_tokens"] - before["prefix_query_tokens"] == tokens
    assert scheduler["prefix_hit_tokens"] - before["prefix_hit_tokens"] == sum(CACHED) + 112
    assert scheduler["pages_used"] == 0


def test_contracts_do_not_share(tiny_checkpoint: Path, plain: Engine) -> None:
    """What `resident` computed with two experts of eight is no basis for `exact`."""
    asked = prompts()
    expected = [answer(plain, prompt).token_ids for prompt in asked]
    with Engine.load(tiny_checkpoint, expert_memory="2 slots", **OPTIONS) as engine:
        assert answer(engine, asked[0]).token_ids != expected[0]
        first = answer(engine, asked[0], routing="exact")
        assert (first.token_ids, first.num_cached_tokens) == (expected[0], 0)
        again = [answer(engine, prompt, routing="exact") for prompt in asked]
    assert [output.token_ids for output in again] == expected
    assert [output.num_cached_tokens for output in again] == CACHED


def test_a_conversation_goes_on_from_its_last_answer(engine: Engine, plain: Engine) -> None:
    conversation: list[int] = []
    for turn in range(4):
        known = len(conversation) - 1  # the last token of an answer was sampled and never computed
        conversation += drawn(9)
        output = answer(engine, conversation)
        assert output.token_ids == answer(plain, conversation).token_ids
        assert output.num_cached_tokens == (known // 16 * 16 if turn else 0)
        conversation += output.token_ids


def test_preempted_requests_give_the_same_tokens(tiny_checkpoint: Path, plain: Engine) -> None:
    """A KV cache for one full sequence (96 tokens, 6 pages) under requests that grow to 4 and 6 pages."""
    params = SamplingParams(max_tokens=50, temperature=0, ignore_eos=True)
    asked = [drawn(9), drawn(40), drawn(20)]
    page = 16 * 3 * 2 * 2 * 8 * 4
    with Engine.load(tiny_checkpoint, expert_memory="100%", kv_memory=7 * page, **OPTIONS) as engine:
        outputs = engine.generate(asked, params)
        scheduler = engine.state()["scheduler"]
    assert scheduler["preemptions"] > 0
    assert scheduler["pages_used"] == 0
    assert [output.token_ids for output in outputs] == [answer(plain, prompt, params).token_ids for prompt in asked]


def test_an_aborted_request_leaves_what_it_computed(engine: Engine, plain: Engine) -> None:
    prompt = drawn(40)
    stream = engine.stream(prompt, GREEDY)
    next(stream)
    stream.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert engine.state()["scheduler"]["pages_used"] == 0
    output = answer(engine, prompt)
    assert (output.token_ids, output.num_cached_tokens) == (answer(plain, prompt).token_ids, 32)


def test_a_step_that_failed_leaves_nothing(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = drawn(40)

    def fail(_: object) -> None:
        raise OSError("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(engine.loop.dispatcher, "collect", fail)
        with pytest.raises(OSError, match="the disk is gone"):
            answer(engine, prompt)
    assert answer(engine, prompt).num_cached_tokens == 0


def test_prompts_that_are_scored_or_recorded_are_computed(engine: Engine, tmp_path: Path) -> None:
    prompt, scored = drawn(40), SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    first, again = (answer(engine, prompt, scored) for _ in range(2))
    assert again.num_cached_tokens == 0
    assert first.prompt_logprobs == again.prompt_logprobs
    engine.record_traces(tmp_path / "trace.npz")
    assert answer(engine, prompt).num_cached_tokens == 0
    engine.stop_recording()
    assert RoutingTrace.load(tmp_path / "trace.npz").token_pos.tolist() == list(range(40 + GREEDY.max_tokens - 1))
    assert answer(engine, prompt).num_cached_tokens == 32


def test_sliding_windows_share_prefixes(tmp_path: Path) -> None:
    """Pages are kept by position, and a window only hides what is far: a prefix is the same whatever follows."""
    raw, asked = TINY | {"sliding_window": 12}, prompts()
    model, experts = random_model(raw)
    save_checkpoint(tmp_path / "tiny", raw, nnx.state(model), experts)
    tokens = []
    for prefix_caching, cached in ((False, [0] * 4), (True, CACHED)):
        with Engine.load(tmp_path / "tiny", expert_memory="100%", prefix_caching=prefix_caching, **OPTIONS) as engine:
            outputs = [answer(engine, prompt) for prompt in (asked[0], *asked)][1:]
        tokens.append([output.token_ids for output in outputs])
        assert [output.num_cached_tokens for output in outputs] == cached
    assert tokens[0] == tokens[1]


def test_routers_that_drop_tokens_by_batch_share_nothing(tmp_path: Path) -> None:
    directory, prompt = write_checkpoint(tmp_path, OPENMOE), drawn(40)
    with Engine.load(directory, expert_memory="100%", router_capacity_factor=2.0, **OPTIONS) as engine:
        outputs = [answer(engine, prompt, SamplingParams(max_tokens=1, temperature=0)) for _ in range(2)]
    assert outputs[0].token_ids == outputs[1].token_ids
    assert outputs[1].num_cached_tokens == 0


@pytest.fixture(scope="module")
def of_eight(tiny_checkpoint: Path) -> Iterator[list[Engine]]:
    """Engines for eight sequences, without reuse and with it."""
    options: dict[str, Any] = OPTIONS | {"expert_memory": "100%", "max_num_seqs": 8}
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(Engine.load(tiny_checkpoint, prefix_caching=reuses, **options))
            for reuses in (False, True)
        ]


@pytest.mark.parametrize(("n", "length"), [(2, 40), (8, 33), (5, 16), (8, 7)])
def test_several_answers_compute_their_prompt_once(
    of_eight: list[Engine], monkeypatch: pytest.MonkeyPatch, n: int, length: int
) -> None:
    """But for the page that the last token is in, of which each has its own."""
    params = SamplingParams(max_tokens=6, temperature=1, seed=3, n=n, ignore_eos=True)
    prompt, computed, outputs = drawn(length), [], []
    dispatch = Dispatcher.dispatch

    def counting(runner: Dispatcher, plan: StepPlan) -> Dispatched:
        computed[-1] += plan.num_prefill_tokens
        return dispatch(runner, plan)

    monkeypatch.setattr(Dispatcher, "dispatch", counting)
    for engine in of_eight:
        computed.append(0)
        outputs.append([completion.token_ids for completion in answer(engine, prompt, params).completions])
    pages = (length - 1) // 16 * 16
    assert computed == [n * length, length + (n - 1) * (length - pages)]
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("routing", ["resident", "exact"])
def test_salts_keep_prompts_apart(engine: Engine, routing: RoutingContract) -> None:
    """In whatever order they come; no salt is one of its own. What tokens are chosen is the same."""
    prompt = drawn(40)
    salts = [None, "a", "b", "resident", "\0", "x" * 256, "\ud800"]
    tokens = set()
    for others, salt in zip([salts[-1], *salts], salts, strict=False):  # of two at a time, as there are few pages
        outputs = [answer(engine, prompt, routing=routing, cache_salt=asked) for asked in (salt, salt, others)]
        cached = [output.num_cached_tokens for output in outputs]
        assert cached == [0, 32, 0 if others == salts[-1] else 32], salt
        tokens |= {tuple(output.token_ids) for output in outputs}
    assert len(tokens) == 1


def test_salts_hold_for_streams_answers_and_together(engine: Engine) -> None:
    prompt = drawn(40)
    tokens = [token for delta in engine.stream(prompt, GREEDY, cache_salt="a") for token in delta.token_ids]
    longer = [*prompt, *tokens, *drawn(4)]
    assert [answer(engine, longer, cache_salt=salt).num_cached_tokens for salt in ("b", None)] == [0, 0]
    engine.add_request("x", longer, GREEDY, cache_salt="a")
    engine.add_request("y", longer, GREEDY, cache_salt="c")
    while not (engine.output("x").finished and engine.output("y").finished):
        engine.step()
    assert engine.pop("x").num_cached_tokens == (len(prompt) + len(tokens) - 1) // 16 * 16 == 32
    assert engine.pop("y").num_cached_tokens == 0
    assert engine.generate([longer] * 2, GREEDY, cache_salt="d")[0].num_cached_tokens == 0


@pytest.mark.parametrize("salt", ["", "x" * 257, 5, b"a", ["a"]])
def test_what_is_no_salt_is_refused(engine: Engine, salt: Any) -> None:
    with pytest.raises(RequestError, match="cache_salt is ") as refused:
        engine.add_request("x", [5, 6], GREEDY, cache_salt=salt)
    assert refused.value.param == "cache_salt"
    assert not engine.has_work()
