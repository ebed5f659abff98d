"""What an engine promises: the same tokens however it batches, chunks, caches and loads."""

from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emoe_jax import Engine, RequestError, SamplingParams
from emoe_jax.device.dispatcher import Dispatcher
from emoe_jax.errors import ConfigError
from emoe_jax.moe import moe_ffn
from emoe_jax.requests.contract import CONTRACTS
from tests.engines import TINY, EngineFactory, random_model
from tests.models.plain import plain_forward

GREEDY = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, 60, size=length).tolist() for length in (3, 17, 1, 40, 9)]


@pytest.fixture(scope="module")
def expected(engine_of: EngineFactory) -> list[list[int]]:
    """Greedy tokens of every prompt alone, everything resident."""
    full = engine_of(expert_memory="100%")
    return [full.generate(prompt, GREEDY)[0].token_ids for prompt in PROMPTS]


def test_all_resident_equals_the_plain_model(engine_of: EngineFactory) -> None:
    model, experts = random_model(TINY)
    identity = jnp.arange(8)

    def moe(rows: jax.Array, ids: jax.Array, weights: jax.Array, layer_experts) -> jax.Array:
        return moe_ffn(rows, ids, weights, identity, layer_experts, model.config, backend="reference")

    plain, _ = plain_forward(model, jnp.asarray([PROMPTS[3]]), experts, moe)
    ours = engine_of(expert_memory="100%").logits(PROMPTS[3])
    np.testing.assert_allclose(ours, plain[0], atol=1e-5)


def test_cached_equals_uncached(engine_of: EngineFactory, expected: list[list[int]]) -> None:
    full = engine_of(expert_memory="100%")
    for prompt, tokens in zip(PROMPTS, expected, strict=True):
        whole = prompt + tokens
        chosen = full.logits(whole[:-1]).argmax(axis=-1)[len(prompt) - 1 :]
        assert chosen.tolist() == tokens


def test_batched_equals_alone(engine_of: EngineFactory, expected: list[list[int]]) -> None:
    outputs = engine_of(expert_memory="100%").generate(PROMPTS, GREEDY)
    assert [output.token_ids for output in outputs] == expected
    assert all(output.substituted == 0.0 for output in outputs)


def test_chunked_prefill_equals_whole(engine_of: EngineFactory, expected: list[list[int]]) -> None:
    outputs = engine_of(expert_memory="100%", max_num_batched_tokens=7).generate(PROMPTS, GREEDY)
    assert [output.token_ids for output in outputs] == expected


@pytest.mark.parametrize("slots", [2, 3, 5])
def test_exact_gives_the_resident_models_tokens(
    engine_of: EngineFactory, expected: list[list[int]], slots: int
) -> None:
    """With 2 slots even one token's experts fill a layer, and prompts of 40 tokens need every expert: waves."""
    engine = engine_of(expert_memory=f"{slots} slots", routing="exact")
    outputs = engine.generate(PROMPTS, GREEDY)
    assert [output.token_ids for output in outputs] == expected
    assert all(output.substituted == 0.0 for output in outputs)


def test_exact_logits_are_bit_identical_at_any_capacity(engine_of: EngineFactory) -> None:
    reference = engine_of(expert_memory="5 slots", routing="exact").logits(PROMPTS[3])
    np.testing.assert_array_equal(engine_of(expert_memory="2 slots", routing="exact").logits(PROMPTS[3]), reference)
    full = engine_of(expert_memory="100%").logits(PROMPTS[3])
    np.testing.assert_allclose(full, reference, atol=1e-5)


def test_resident_substitutes_and_says_so(engine_of: EngineFactory, expected: list[list[int]]) -> None:
    engine = engine_of(expert_memory="3 slots")
    outputs = engine.generate(PROMPTS, GREEDY)
    assert all(0 < output.substituted < 1 for output in outputs)
    assert [output.token_ids for output in outputs] != expected
    assert engine.generate(PROMPTS, GREEDY)[1].token_ids == outputs[1].token_ids  # static residency: reproducible


def test_contracts_mix_in_one_batch(engine_of: EngineFactory, expected: list[list[int]]) -> None:
    engine = engine_of(expert_memory="3 slots", policy="lru")
    for index, prompt in enumerate(PROMPTS):
        engine.add_request(f"r{index}", prompt, GREEDY, routing=CONTRACTS[index % 3])
    while engine.has_work():
        engine.step()
    outputs = [engine.pop(f"r{index}") for index in range(len(PROMPTS))]
    contracts = [output.routing for output in outputs]
    assert contracts == ["resident", "bounded", "exact", "resident", "bounded"]
    assert outputs[2].token_ids == expected[2]
    assert [output.substituted > 0 for output in outputs] == [True, True, False, True, True]


def test_lru_follows_the_wishes(engine_of: EngineFactory) -> None:
    engine = engine_of(expert_memory="4 slots", policy="lru")
    before = engine.state()["residency"]
    engine.generate(PROMPTS, GREEDY)
    after = engine.state()["residency"]
    assert before["experts"] == [[0, 1, 2, 3]] * 3
    assert after["experts"] != before["experts"]
    assert after["loads"]["loads"] > before["loads"]["loads"]
    assert 0 < after["coverage"] < 1


def test_preempted_requests_give_the_same_tokens(engine_of: EngineFactory) -> None:
    """A KV cache for one full sequence (96 tokens, 6 pages) under requests that grow to 4, 5 and 4 pages."""
    params, prompts = SamplingParams(max_tokens=60, temperature=0, ignore_eos=True), PROMPTS[:3]
    page = 16 * 3 * 2 * 2 * 8 * 4
    engine = engine_of(expert_memory="100%", kv_memory=7 * page, max_model_len=96)
    outputs = engine.generate(prompts, params)
    assert engine.state()["scheduler"]["preemptions"] > 0
    assert engine.state()["scheduler"]["pages_used"] == 0
    unhurried = engine_of(expert_memory="100%").generate(prompts, params)
    assert [output.token_ids for output in outputs] == [output.token_ids for output in unhurried]


def test_seeds_decide_the_tokens_whatever_the_batch(engine_of: EngineFactory) -> None:
    engine = engine_of(expert_memory="100%")
    params = SamplingParams(max_tokens=12, temperature=1.0, top_p=0.9, seed=7, ignore_eos=True, n=2)
    alone = engine.generate(PROMPTS[1], params)[0]
    batched = engine.generate(PROMPTS, params)[1]
    for one, other in zip(alone.completions, batched.completions, strict=True):
        assert one.token_ids == other.token_ids
    assert alone.completions[0].token_ids != alone.completions[1].token_ids


def test_logprobs_are_those_of_the_model(engine_of: EngineFactory) -> None:
    engine = engine_of(expert_memory="100%")
    params = SamplingParams(max_tokens=3, temperature=0, logprobs=4, ignore_eos=True)
    output = engine.generate(PROMPTS[0], params)[0]
    assert output.logprobs is not None
    logits = engine.logits(PROMPTS[0] + output.token_ids[:-1])[len(PROMPTS[0]) - 1 :]
    expected = jax.nn.log_softmax(jnp.asarray(logits), axis=-1)
    for position, entry in enumerate(output.logprobs):
        assert entry.logprob == pytest.approx(float(expected[position, entry.token_id]), abs=1e-4)
        assert entry.top[0] == (entry.token_id, pytest.approx(entry.logprob))
        assert len(entry.top) == 4


def test_streaming_pieces_make_the_whole(engine_of: EngineFactory, expected: list[list[int]]) -> None:
    deltas = list(engine_of(expert_memory="100%").stream(PROMPTS[0], GREEDY))
    assert [token for delta in deltas for token in delta.token_ids] == expected[0]
    assert [delta.finish_reason for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
    assert deltas[-1].finish_reason == "length"


def test_closing_a_stream_frees_its_pages(engine_of: EngineFactory) -> None:
    engine = engine_of(expert_memory="100%")
    stream = engine.stream(PROMPTS[0], GREEDY)
    next(stream)
    assert engine.state()["scheduler"]["pages_used"] > 0
    stream.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert engine.state()["scheduler"]["pages_used"] == 0
    assert not engine.has_work()


@pytest.mark.parametrize("kv_pages", [None, 7])
def test_overlap_changes_no_token(engine_of: EngineFactory, kv_pages: int | None) -> None:
    """Ends by token, length and stop token, several completions, penalties, seeds, both contracts, preemption."""
    memory = {} if kv_pages is None else {"kv_memory": kv_pages * 16 * 3 * 2 * 2 * 8 * 4}
    outputs = []
    for overlap in (False, True):
        engine = engine_of(expert_memory="100%", max_model_len=96, overlap=overlap, **memory)
        for index, prompt in enumerate(PROMPTS * 2):
            params = SamplingParams(
                max_tokens=(1, 55, 30)[index % 3],
                temperature=(0.0, 0.9)[index % 2],
                seed=index,
                n=1 + (index == 3),
                ignore_eos=index % 4 == 0,
                stop_token_ids=tuple(range(0, 60, 6)) if index == 5 else (),
                presence_penalty=float(index in (2, 7)),
                logprobs=2 if index == 4 else None,
            )
            engine.add_request(str(index), prompt, params, routing=CONTRACTS[index % 3])
        steps = 0
        while engine.has_work():
            engine.step()
            steps += 1
            if steps == 9:
                engine.abort("8")
        outputs.append([engine.pop(str(index)).completions for index in range(len(PROMPTS) * 2) if index != 8])
        engine.pop("8")
        assert engine.state()["scheduler"]["pages_used"] == 0
        assert (engine.state()["scheduler"]["preemptions"] > 0) == (kv_pages is not None)
    plain, overlapped = outputs
    for one, other in zip(plain, overlapped, strict=True):
        assert [c.token_ids for c in one] == [c.token_ids for c in other]
        assert [c.finish_reason for c in one] == [c.finish_reason for c in other]


def test_overlap_keeps_the_contracts_tokens_apart(engine_of: EngineFactory) -> None:
    """Resident sequences that come later are computed before an exact one that came earlier."""
    outputs = []
    for overlap in (False, True):
        engine = engine_of(expert_memory="100%", max_model_len=96, overlap=overlap)
        for index, routing in enumerate(("resident", "exact", "resident", "resident")):
            params = SamplingParams(max_tokens=30, temperature=1.0, seed=index, ignore_eos=True)
            engine.add_request(str(index), PROMPTS[index], params, routing=routing)
            for _ in range(5):
                engine.step()
        while engine.has_work():
            engine.step()
        outputs.append([engine.pop(str(index)).token_ids for index in range(4)])
    assert outputs[0] == outputs[1]


def test_the_next_step_is_dispatched_before_tokens_are_read(
    engine_of: EngineFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(expert_memory="100%")
    engine.step()  # what an earlier test may have left in flight
    events: list[str] = []
    for name in ("dispatch", "collect"):
        original = getattr(Dispatcher, name)

        def spy(*args: Any, name: str = name, original: Any = original) -> Any:
            events.append(name)
            return original(*args)

        monkeypatch.setattr(Dispatcher, name, spy)
    engine.generate(PROMPTS[0], SamplingParams(max_tokens=4, temperature=0, ignore_eos=True))
    assert events == ["dispatch", "dispatch", "collect", "dispatch", "collect", "dispatch", "collect", "collect"]
    events.clear()
    penalised = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True, presence_penalty=1.0)
    engine.generate(PROMPTS[0], penalised)
    assert events == ["dispatch", "collect"] * 3


def test_nothing_compiles_after_warm_up(tiny_checkpoint: Path) -> None:
    compilations: list[str] = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if "backend_compile" in event:
            compilations.append(event)

    options: dict[str, Any] = {"policy": "lru", "max_num_seqs": 4, "max_num_batched_tokens": 64, "audit_rate": 1.0}
    with Engine.load(tiny_checkpoint, expert_memory="3 slots", **options) as engine:
        jax.monitoring.register_event_duration_secs_listener(listen)
        try:
            engine.warm_up()
            assert compilations  # the listener hears what happens
            compilations.clear()
            for turn, seed in enumerate((0, 1, 1, 2)):
                rng = np.random.default_rng(seed)
                for index in range(6):
                    prompt = rng.integers(0, 60, size=rng.integers(1, 70)).tolist()
                    params = SamplingParams(
                        max_tokens=int(rng.integers(1, 20)),
                        temperature=float(rng.choice([0.0, 0.8])),
                        top_k=int(rng.choice([0, 5])),
                        logprobs=[None, 3][index % 2],
                        presence_penalty=[0.0, 1.0, 0.5][index % 3],
                        prompt_logprobs=[None, None, 1][index % 3],
                    )
                    engine.add_request(f"{turn}-{index}", prompt, params, routing=CONTRACTS[index % 3])
                while engine.has_work():
                    engine.step()
        finally:
            jax.monitoring.unregister_event_duration_listener(listen)
        state = engine.state()
        assert state["scheduler"]["prefix_hit_tokens"] > 0  # prompts that came twice
        assert state["audit"]["seconds"] > 0
    assert compilations == []


def test_a_failing_read_ends_only_its_requests(
    tiny_checkpoint: Path, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"expert_memory": "2 slots", "policy": "static", "host_memory": 0}
    with Engine.load(tiny_checkpoint, max_num_seqs=4, **options) as engine:
        reader = "emoe_jax.checkpoint.checkpoint.Checkpoint.read_expert"

        def fail(*_: object) -> None:
            raise OSError("the disk is gone")

        engine.add_request("exact", PROMPTS[1], GREEDY, routing="exact")
        with monkeypatch.context() as patch:
            patch.setattr(reader, fail)
            with pytest.raises(OSError, match="the disk is gone"):
                engine.step()
        assert engine.pop("exact").completions[0].finish_reason == "error"
        assert engine.state()["scheduler"]["pages_used"] == 0
        assert engine.generate(PROMPTS[1], GREEDY, routing="exact")[0].token_ids == expected[1]


@pytest.mark.parametrize(
    ("prompt", "match"),
    [
        ([], "empty"),
        ([61], "vocabulary"),
        ([-1], "vocabulary"),
        ([True], "not an integer"),
        (list(range(60)) * 2, "at most 95"),
        ("text", "no tokenizer"),
    ],
)
def test_bad_prompts_are_refused(engine_of: EngineFactory, prompt: list[int] | str, match: str) -> None:
    engine = engine_of(expert_memory="100%")
    with pytest.raises(RequestError, match=match):
        engine.add_request("bad", prompt, GREEDY)
    assert not engine.has_work()


def test_what_is_no_prompt_or_no_parameters_is_refused(engine_of: EngineFactory) -> None:
    engine, anything = engine_of(expert_memory="100%"), cast(Any, [GREEDY])
    for prompts in cast(Any, (5, None, 1.5)):
        with pytest.raises(RequestError, match=r"^prompts are \w+; expected text, token ids, or a list of them$"):
            engine.generate(prompts)
    with pytest.raises(RequestError, match="params are list; expected one SamplingParams"):
        engine.generate([PROMPTS[0]], anything)
    assert not engine.has_work()


def test_a_closed_engine_says_so(engine_of: EngineFactory) -> None:
    engine = engine_of(expert_memory="3 slots", max_num_seqs=1)  # not shared: it is closed here
    pieces = engine.stream([1, 2, 3], SamplingParams(max_tokens=9, ignore_eos=True))
    next(pieces)
    engine.close()
    for use in (
        lambda: engine.generate([1, 2, 3]),
        lambda: engine.logits([1, 2, 3]),
        lambda: engine.step(),
        lambda: next(pieces),
    ):
        with pytest.raises(RuntimeError, match="the engine is closed"):
            use()


@pytest.mark.parametrize("name", ["max_num_seqs", "max_num_batched_tokens"])
@pytest.mark.parametrize("count", [0, -3])
def test_a_step_takes_at_least_one_sequence_and_token(engine_of: EngineFactory, name: str, count: int) -> None:
    with pytest.raises(ConfigError, match=f"{name} is {count}; expected at least 1"):
        engine_of(**{name: count})
