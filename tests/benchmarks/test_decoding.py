from pathlib import Path

import pytest

from benchmarks import decoding
from benchmarks.peers import step_bytes
from emoe_jax.models import config_from_hf
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


@pytest.mark.parametrize("options", [["--repetitions", "0"], ["--shares", "1"]])
def test_bad_options_are_refused(options: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        decoding.main(options)
    assert caught.value.code == 2
    assert options[0] in capsys.readouterr().err
