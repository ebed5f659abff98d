from pathlib import Path

import pytest

from benchmarks import decoding, decoding_context
from benchmarks.peers import step_bytes
from emoe_jax.attention.blocks import LARGE
from emoe_jax.models import config_from_hf
from emoe_jax.scheduling.pages import PAGE_SIZE
from train.demo.shape import hf_config

TINY = hf_config(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_local_experts=8,
    num_experts_per_tok=2,
)


def test_a_tiny_model_is_measured_against_its_floor(tmp_path: Path) -> None:
    decoding.write_random_checkpoint(tmp_path, TINY)
    numbers = decoding.measure(str(tmp_path), 0.5, "emoe", None, 2)
    assert all(numbers[f"{kind}_ratio_b{batch}"] > 0 for kind in ("decode", "still") for batch in (1, 16))
    assert 0 < numbers["coverage"] < 1
    assert numbers["loads_per_step"] > 0
    config = config_from_hf(TINY)
    dense = step_bytes(config, 16) - 4 * 2 * 8 * (1 - 0.75**16) * config.expert_params
    few = 4 * 2 * 4 * (1 - 0.5**16) * config.expert_params  # 4 of 8 experts, top-2
    assert numbers["floor_ratio_b16"] == pytest.approx(step_bytes(config, 16) / (dense + few))


def test_formats_are_measured_with_all_experts_resident(tmp_path: Path) -> None:
    decoding.write_random_checkpoint(tmp_path, TINY)
    numbers = decoding.measure_format(str(tmp_path), "int8", 1)
    assert numbers.keys() == {f"{what}_b{batch}" for what in ("decode_ratio", "step_s") for batch in (1, 8)}
    assert all(value > 0 for value in numbers.values())


def test_contexts_are_measured_against_both_floors(tmp_path: Path) -> None:
    decoding.write_random_checkpoint(tmp_path, TINY | {"max_position_embeddings": 128})
    numbers = decoding_context.measure_contexts(str(tmp_path), [20, 60], 1)
    config = config_from_hf(TINY)
    for context, row in numbers["contexts"].items():
        read = 2 * 4 * 2 * config.num_kv_heads * config.head_dim * int(context)
        assert row["decode_floor_ms"] == pytest.approx(read / numbers["read_gb_per_s"] / 1e6)
        assert row["prefill_tokens_per_s"] == pytest.approx(int(context) / row["prefill_s"])
        assert 0 < row["decode_floor_ms"] < row["decode_ms"]
        assert 0 < row["prefill_tokens_per_s"] < row["prefill_floor_tokens_per_s"]


def test_only_whole_large_blocks_are_copied() -> None:
    config = config_from_hf(TINY)
    assert decoding_context.copy_seconds(config, LARGE * PAGE_SIZE - 1) == 0
    assert decoding_context.copy_seconds(config, LARGE * PAGE_SIZE) > 0


@pytest.mark.parametrize(("tokens", "window", "pairs"), [(5, None, 15), (5, 2, 9), (3, 8, 6), (1, 1, 1)])
def test_the_products_of_a_prompt_are_counted(tokens: int, window: int | None, pairs: int) -> None:
    """Pairs of a position and one that it sees, by hand; weights by what the config says of them."""
    config = config_from_hf(TINY | {"sliding_window": window})
    D, N, K, H = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
    per_token = config.num_layers * (D * (N + 2 * K) * H + N * H * D + D * 8 + 2 * config.expert_params)
    want = 2 * tokens * per_token + 4 * N * H * pairs * config.num_layers + 2 * 64 * D
    assert decoding_context.prefill_flops(config, tokens) == want


@pytest.mark.parametrize("options", [["--repetitions", "0"], ["--shares", "1"], ["--context", "0"]])
def test_bad_options_are_refused(options: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        decoding.main(options)
    assert caught.value.code == 2
    assert options[0] in capsys.readouterr().err
