"""Log probabilities of a prompt's own tokens: those of the model, however the prompt is cut into chunks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emoe_jax import RequestOutput, SamplingParams
from emoe_jax.requests.contract import RoutingContract
from tests.engines import EngineFactory

PROMPT = np.random.default_rng(3).integers(0, 60, size=40).tolist()
PARAMS = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True, prompt_logprobs=2)


def check(output: RequestOutput, logits: np.ndarray) -> None:
    assert output.prompt_logprobs is not None
    expected = np.asarray(jax.nn.log_softmax(jnp.asarray(logits), axis=-1))
    assert [entry.token_id for entry in output.prompt_logprobs] == PROMPT[1:]
    for position, entry in enumerate(output.prompt_logprobs):
        assert entry.logprob == pytest.approx(expected[position, entry.token_id], abs=1e-4)
        assert [token for token, _ in entry.top] == np.argsort(-expected[position], kind="stable")[:2].tolist()


@pytest.mark.parametrize(("batched_tokens", "routing"), [(64, "resident"), (7, "resident"), (32, "exact")])
def test_they_are_those_of_the_model(engine_of: EngineFactory, batched_tokens: int, routing: RoutingContract) -> None:
    full = engine_of(expert_memory="100%")
    memory = "3 slots" if routing == "exact" else "100%"
    engine = engine_of(expert_memory=memory, max_num_batched_tokens=batched_tokens)
    check(engine.generate(PROMPT, PARAMS, routing=routing)[0], full.logits(PROMPT))


def test_a_preempted_prompt_keeps_them(engine_of: EngineFactory) -> None:
    """A KV cache for one full sequence (96 tokens, 6 pages), shared by two."""
    params = SamplingParams(max_tokens=50, temperature=0, ignore_eos=True, prompt_logprobs=2)
    page = 16 * 3 * 2 * 2 * 8 * 4
    engine = engine_of(expert_memory="100%", kv_memory=7 * page, max_model_len=96)
    before = engine.state()["scheduler"]["preemptions"]
    outputs = engine.generate([PROMPT[:9], PROMPT], params)
    assert engine.state()["scheduler"]["preemptions"] > before
    check(outputs[1], engine_of(expert_memory="100%").logits(PROMPT))


def test_a_stream_brings_them_first(engine_of: EngineFactory) -> None:
    first, second = engine_of(expert_memory="100%").stream(PROMPT, PARAMS)
    assert [entry.token_id for entry in first.prompt_logprobs] == PROMPT[1:]
    assert second.prompt_logprobs == ()


def test_a_prompt_of_one_token_has_none(engine_of: EngineFactory) -> None:
    engine = engine_of(expert_memory="100%")
    assert engine.generate([5], PARAMS)[0].prompt_logprobs == []
    assert engine.generate([5], SamplingParams(max_tokens=1))[0].prompt_logprobs is None
