"""The engine computes every family as transformers does, whatever is resident."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emoe_jax import Engine, SamplingParams
from emoe_jax.device.ways import Ways
from tests.golden.tiny import write_checkpoint

GOLDEN = Path(__file__).parent.parent / "golden"
NAMES = ["glm4_groups", "granite_multipliers", "gpt_oss_windows"]
FEW_SLOTS = ["olmoe_options", "qwen3_window", "deepseek_v2_lite", "deepseek_v3_groups", "glm4_lite_layers"]
"""Of these one engine each, as other tests have engines with attention and routers like theirs."""
OPTIONS = {"policy": "lru", "predictor": "none", "max_model_len": 64, "max_num_seqs": 2, "max_num_batched_tokens": 16}


def golden_checkpoint(name: str, directory: Path) -> tuple[dict[str, Any], Any, SamplingParams]:
    """The configuration and golden numbers of a checkpoint that is written to `directory`, and their sampling."""
    golden = np.load(GOLDEN / f"{name}.npz")
    raw = json.loads(str(golden["config"]))
    write_checkpoint(directory, raw)
    return raw, golden, SamplingParams(max_tokens=len(golden["greedy"]), temperature=0, ignore_eos=True)


@pytest.mark.parametrize("name", NAMES)
def test_exact_gives_the_golden_tokens_at_any_capacity(name: str, tmp_path: Path) -> None:
    raw, golden, greedy = golden_checkpoint(name, tmp_path)
    for memory in ("100%", f"{raw['num_experts_per_tok'] + 1} slots"):
        with Engine.load(tmp_path, expert_memory=memory, routing="exact", **OPTIONS) as engine:
            prompts = [row.tolist() for row in golden["tokens"]]
            (exact, _) = engine.generate(prompts, greedy)
            assert exact.token_ids == golden["greedy"].tolist()
            assert (exact.substituted, exact.substituted_weight) == (0, 0)
            logits = engine.logits(prompts[1])
            np.testing.assert_allclose(logits, golden["logits"][1], atol=2e-4, rtol=0)
            (resident, _) = engine.generate(prompts, greedy, routing="resident")
            assert (resident.substituted > 0) == (memory != "100%")
            assert 0 <= resident.substituted_weight <= 1


@pytest.mark.parametrize("name", FEW_SLOTS)
def test_exact_gives_the_golden_tokens_with_few_slots(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layer by layer, so that the whole step is not compiled besides."""
    monkeypatch.setattr(Ways, "peek", lambda ways, shape: "layered")
    raw, golden, greedy = golden_checkpoint(name, tmp_path)
    slots = f"{raw['num_experts_per_tok'] + 1} slots"
    with Engine.load(tmp_path, expert_memory=slots, routing="exact", **OPTIONS) as engine:
        (exact,) = engine.generate([golden["tokens"][0].tolist()], greedy)
    assert exact.token_ids == golden["greedy"].tolist()
