"""A predictor that reads prompts' tokens is asked with these tokens, and one that does not without."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emoe_jax import Engine, SamplingParams
from emoe_jax.predictor import Predictor, PredictorConfig, Prompts, network
from emoe_jax.predictor.layers import LayerPrior
from emoe_jax.predictor.token_prior import TokenPrior
from emoe_jax.predictor.tokens import TokenTable
from emoe_jax.traces import RoutingTrace
from tests.engines import RESIDENT, TINY, answered

LAYERS, EXPERTS, TOP_K = 3, 8, 2
PARAMS = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)
PROMPTS = [[5, 9, 5], [9, 9, 9, 9], [11]]


def predictor_of(trace: RoutingTrace, reads: bool) -> Predictor:
    prompts = Prompts.of(trace, first_tokens=4)
    config = PredictorConfig(LAYERS, EXPERTS, TOP_K, embedding_dim=TINY["hidden_size"], members=0)
    predictor = Predictor(config, prompts, layers=LayerPrior.ignorant(config))
    predictor.weights = network.init(config, predictor.sizes, 0)
    if reads:
        table, said = TokenTable.learn(trace, np.arange(len(prompts)), 1000)
        predictor.tokens, _ = TokenPrior.fit(table, said, [said, said], prompts.counts)
    return predictor


@pytest.fixture(scope="module")
def trace(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> RoutingTrace:
    """Recorded with the tokens of its prompts."""
    path = tmp_path_factory.mktemp("trace") / "trace.npz"
    with Engine.load(tiny_checkpoint, expert_memory="100%", record_traces=path, record_prompt_tokens=True) as engine:
        engine.generate(PROMPTS * 4, PARAMS, task="odd")
    trace = RoutingTrace.load(path)
    assert [ids.tolist() for ids in trace.tokens_by_prompt()] == PROMPTS * 4
    return trace


@pytest.mark.parametrize("reads", [True, False])
def test_the_predictor_sees_the_tokens_of_every_prompt(
    tiny_checkpoint: Path, trace: RoutingTrace, reads: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor_of(trace, reads).save(tmp_path / "predictor")
    seen: list[Any] = []
    predict = Predictor.predict_next

    def spy(self: Predictor, prompts: Any, rows: int, *tokens: Any) -> np.ndarray:
        answers = predict(self, prompts, rows, *tokens)
        seen.append((tokens, np.abs(answers - predict(self, prompts, rows)).max()))
        return answers

    monkeypatch.setattr(Predictor, "predict_next", spy)
    with Engine.load(
        tiny_checkpoint, predictor=tmp_path / "predictor", expert_memory="3 slots", predict_every=1, **RESIDENT
    ) as engine:
        for prompt in PROMPTS:
            engine.generate([prompt], PARAMS, task="odd")
        answered(engine)
    if reads:
        told = [[list(ids) for ids in asked] for tokens, _ in seen for asked in tokens]
        assert told == [[prompt] for prompt in PROMPTS]
        assert max(difference for _, difference in seen) > 0.005  # what they say of experts
    else:
        assert [tokens for tokens, _ in seen] == [()] * len(PROMPTS)
