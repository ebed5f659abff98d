"""Logits of texts longer than a batch: those of the plain model, in memory that does not grow with the square."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from emoe_jax import Engine
from emoe_jax.device.batch import UNCACHED_ROWS, uncached_shape
from emoe_jax.engine.quality import Quality
from emoe_jax.models import config_from_hf, save_checkpoint
from tests.device.test_lowering import Pieces
from tests.engines import TINY, random_model
from tests.models.loaded import load

RAW: dict[str, Any] = TINY | {"max_position_embeddings": 2048, "num_hidden_layers": 2}
WINDOWED = RAW | {"sliding_window": 300}
RNG = np.random.default_rng(2)


@pytest.fixture(scope="module", params=[RAW, WINDOWED], ids=["full", "window"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, experts = random_model(request.param)
    directory = tmp_path_factory.mktemp("long") / "long"
    save_checkpoint(directory, request.param, nnx.state(model), experts)
    return directory


@pytest.mark.parametrize("length", [UNCACHED_ROWS, UNCACHED_ROWS + 1, 1300])
def test_they_are_those_of_the_plain_model(directory: Path, length: int) -> None:
    tokens = RNG.integers(0, 60, size=length)
    want, _ = load(directory).forward(tokens[None])
    choices: list[dict[str, Any]] = [{"expert_memory": "100%"}, {"expert_memory": "3 slots", "routing": "exact"}]
    for options in choices:
        with Engine.load(directory, max_num_seqs=2, policy="static", **options) as engine:
            got = engine.logits(tokens.tolist())
            assert got.shape == want[0].shape
            np.testing.assert_allclose(got, want[0], atol=2e-4, rtol=1e-4)
            assert engine.generate([tokens[:5].tolist()])[0].completions[0].finish_reason is not None


def test_the_resident_contract_holds_in_every_batch(directory: Path) -> None:
    """The first part of a long text has the logits that it has alone, and quality reads a long text."""
    tokens = RNG.integers(0, 60, size=700).tolist()
    with Engine.load(directory, max_num_seqs=2, policy="static", expert_memory="3 slots", routing="resident") as engine:
        whole, part = engine.logits(tokens), engine.logits(tokens[:400])
        np.testing.assert_allclose(whole[:400], part, atol=2e-4, rtol=1e-4)
        quality = engine.quality(tokens)
        assert quality.perplexity_ratio != 1
        assert quality.kl > 0


def test_quality_adds_up_over_blocks_of_rows() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 7, size=1100).tolist()
    ours, theirs = rng.standard_normal((2, 1100, 7)).astype(np.float32)
    log_ours, log_theirs = (np.asarray(jax.nn.log_softmax(x[:-1])) for x in (ours, theirs))
    at = np.arange(1099), np.asarray(tokens[1:])
    quality = Quality.of(tokens, ours, theirs)
    assert quality.perplexity == pytest.approx(np.exp(-log_ours[at].mean()), rel=1e-5)
    assert quality.full_perplexity == pytest.approx(np.exp(-log_theirs[at].mean()), rel=1e-5)
    assert quality.kl == pytest.approx((np.exp(log_theirs) * (log_theirs - log_ours)).sum(axis=-1).mean(), rel=1e-4)


def test_a_layer_s_temporaries_grow_with_the_length_at_most() -> None:
    """Of a batch within a long text, whose keys are in pages: with the pages not at all."""
    temporaries = []
    for pages in (64, 512):
        pieces = Pieces(uncached_shape(UNCACHED_ROWS, pages), 3, platform="cpu", pages=pages + 1)
        jitted, arguments, statics = pieces.attend_and_route()
        temporaries.append(jitted.lower(*arguments, **statics).compile().memory_analysis().temp_size_in_bytes)
    assert temporaries[1] < 1.1 * temporaries[0] + 64 * 1024
    uncached = []
    for rows in (2048, 4096):
        pieces = Pieces(uncached_shape(rows, 0), 3, platform="cpu")
        jitted, (leaves, x, _, *others), statics = pieces.attend_and_route()
        lowered = jitted.lower(leaves, x, None, *others, **statics)
        uncached.append(lowered.compile().memory_analysis().temp_size_in_bytes)
    assert uncached[1] < 2.3 * uncached[0]
    assert uncached[1] < pieces.config.num_heads * 4096 * 4096


def test_logits_of_a_scored_prompt_exist_for_some_of_its_rows() -> None:
    config = config_from_hf(RAW | {"vocab_size": 5000})
    temporaries = []
    for rows in (64, 512):
        jitted, arguments, statics = Pieces(uncached_shape(rows, 0), 3, config, "cpu").prompt_logprobs()
        temporaries.append(jitted.lower(*arguments, **statics).compile().memory_analysis().temp_size_in_bytes)
    assert temporaries[1] - temporaries[0] < 0.1 * 4 * (512 - 64) * config.vocab_size
