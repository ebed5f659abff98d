"""The engine computes every family as transformers does, whatever is resident."""

import json
from pathlib import Path

import numpy as np
import pytest

from emoe_jax import Engine, SamplingParams
from tests.golden.tiny import write_checkpoint

GOLDEN = Path(__file__).parent.parent / "golden"
NAMES = ["glm4_groups", "granite_multipliers", "gpt_oss_windows"]


@pytest.mark.parametrize("name", NAMES)
def test_exact_gives_the_golden_tokens_at_any_capacity(name: str, tmp_path: Path) -> None:
    golden = np.load(GOLDEN / f"{name}.npz")
    raw = json.loads(str(golden["config"]))
    directory = write_checkpoint(tmp_path / "model", raw)
    greedy = SamplingParams(max_tokens=len(golden["greedy"]), temperature=0, ignore_eos=True)
    options = {
        "policy": "lru",
        "predictor": "none",
        "max_model_len": 64,
        "max_num_seqs": 2,
        "max_num_batched_tokens": 16,
    }
    for memory in ("100%", f"{raw['num_experts_per_tok'] + 1} slots"):
        with Engine.load(directory, expert_memory=memory, routing="exact", **options) as engine:
            prompts = [row.tolist() for row in golden["tokens"]]
            (exact, _) = engine.generate(prompts, greedy)
            assert exact.token_ids == golden["greedy"].tolist()
            assert (exact.substituted, exact.substituted_weight) == (0, 0)
            logits = engine.logits(prompts[1])
            np.testing.assert_allclose(logits, golden["logits"][1], atol=2e-4, rtol=0)
            (resident, _) = engine.generate(prompts, greedy, routing="resident")
            assert (resident.substituted > 0) == (memory != "100%")
            assert 0 <= resident.substituted_weight <= 1
