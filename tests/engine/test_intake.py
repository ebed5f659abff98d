"""What the engine does when a request comes is little, however many sequences it has and however long its prompt is."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emoe_jax import RequestError, SamplingParams
from emoe_jax.engine.intake import MAX_CLASSIFIED_TOKENS, Intake
from emoe_jax.requests.adjustment import LogitAdjustment
from tests.checkpoint.test_tokenizer import byte_level
from tests.engines import EngineFactory

PROMPT = [5, 9, 17, 3]


def test_special_tokens_have_a_text_where_a_request_asks_for_it(
    engine_of: EngineFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, tokenizer = engine_of(expert_memory="100%"), byte_level(tmp_path)
    monkeypatch.setattr(engine._intake, "_tokenizer", tokenizer)
    texts = []
    for shown in ((), (0,)):
        params = SamplingParams(forced_token_ids=(30, 0, 1, 30), shown_token_ids=shown)
        texts.append(engine.generate(PROMPT, params)[0].text)
    letter = tokenizer.token_text(30)
    assert texts == [letter * 2, f"{letter}<s>{letter}"]


@pytest.mark.parametrize(
    "params", [{"presence_penalty": 1.0}, {"logit_bias": {3: 5.0}}, {"repetition_penalty": 1.5, "stop_token_ids": (7,)}]
)
def test_sequences_that_wait_hold_nothing(
    engine_of: EngineFactory, monkeypatch: pytest.MonkeyPatch, params: dict[str, Any]
) -> None:
    """Of 64 sequences, only those that have run have changes of logits and a stream of text."""
    engine = engine_of(expert_memory="100%")
    made: list[int] = []
    text_stream = Intake.text_stream
    monkeypatch.setattr(Intake, "text_stream", lambda self, item: made.append(item.index) or text_stream(self, item))
    engine.add_request("many", PROMPT, SamplingParams(max_tokens=4, n=64, ignore_eos=True, **params))
    waiting = engine.parts.scheduler.waiting
    assert len(waiting) == 64
    assert all(sequence.prompt_token_ids is waiting[0].prompt_token_ids for sequence in waiting)
    adjustments = [sequence.adjustment for sequence in waiting if sequence.adjustment is not None]
    assert len(adjustments) == 64
    assert not made
    assert not any("_changes" in vars(adjustment) for adjustment in adjustments)
    while not made:
        engine.step()
    started = set(range(64)) - {sequence.index for sequence in engine.parts.scheduler.waiting}  # some may have ended
    assert set(made) <= started
    assert 0 < sum("_changes" in vars(adjustment) for adjustment in adjustments) <= len(started) < 64
    engine.pop("many")


@pytest.mark.parametrize("size", [1, 64, 65, 4096 + 5])
def test_the_mean_of_embeddings(engine_of: EngineFactory, size: int) -> None:
    runner = engine_of(expert_memory="100%").parts.runner
    table = np.stack([np.asarray(runner.mean_embedding([token])) for token in range(61)])
    assert len(np.unique(table, axis=0)) == len(table)
    tokens = np.random.default_rng(size).integers(0, len(table), size)
    expected = table[tokens].astype(np.float64).mean(axis=0)
    np.testing.assert_allclose(runner.mean_embedding(tokens.tolist()), expected, atol=2e-6)


@pytest.mark.parametrize(
    ("tokens", "problem"),
    [
        ([1, 2, -1], "token id -1 is outside"),
        ([1, 61], "token id 61 is outside"),
        ([1, True], "token id True is not an integer"),
        ([1, 2.0], "token id 2.0 is not an integer"),
        ([1, "2"], "token id '2' is not an integer"),
    ],
)
def test_what_is_no_token_is_named(engine_of: EngineFactory, tokens: list[Any], problem: str) -> None:
    engine = engine_of(expert_memory="100%")
    with pytest.raises(RequestError, match=problem):
        engine.add_request("a", tokens, SamplingParams())
    engine.logits(np.asarray([1, 2, 3]))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("length", [3, MAX_CLASSIFIED_TOKENS, 5 * MAX_CLASSIFIED_TOKENS])
def test_long_prompts_are_classified_by_both_ends(
    engine_of: EngineFactory, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    intake = engine_of(expert_memory="100%")._intake
    decoded: list[list[int]] = []

    class Tokenizer:
        def decode(self, ids: list[int]) -> str:
            decoded.append(ids)
            return "text"

    class Classifier:
        def classify(self, text: str) -> str:
            return text + "!"

    monkeypatch.setattr(intake, "_tokenizer", Tokenizer())
    monkeypatch.setattr(intake, "_classifier", Classifier())
    tokens = list(range(length))
    assert intake._classify(tokens, tokens) == "text!"
    half = MAX_CLASSIFIED_TOKENS // 2
    assert decoded == [tokens if length <= MAX_CLASSIFIED_TOKENS else tokens[:half] + tokens[-half:]]


def test_an_adjustment_counts_as_before() -> None:
    params = SamplingParams(presence_penalty=1.0, repetition_penalty=2.0, logit_bias={2: 3.0})
    adjustment = LogitAdjustment(params, PROMPT, 20)
    adjustment.update([2, 4])
    found = {token: (bias, repeated) for token, bias, repeated in zip(*adjustment.changes, strict=True)}
    assert found == {2: (2.0, True), 4: (-1.0, True)} | dict.fromkeys(set(PROMPT) - {2, 4}, (0.0, True))
