"""Known models have the published sizes, or one line that says why they cannot be planned; known cards are in order."""

import itertools
import json
from pathlib import Path

import pytest

from emoe_jax.device.kv_cache import page_bytes
from emoe_jax.errors import CheckpointError, ConfigError
from emoe_jax.memory.plan import dense_parameters
from emoe_jax.models import config_from_hf
from emoe_jax.planning.catalogue import find_model, known_model, known_models, read_config
from emoe_jax.planning.compiled import shortened
from emoe_jax.planning.targets import CARDS, Target, cards_by_size
from emoe_jax.scheduling.pages import PAGE_SIZE
from tests.engines import TINY

BILLIONS = {
    "deepseek-v2-lite": 15.706,
    "deepseek-v3": 671.03,
    "glm-4.5-air": 106.85,
    "glm-4.7-flash": 29.943,
    "gpt-oss-120b": 116.83,
    "gpt-oss-20b": 20.91,
    "granite-3.0-3b-a800m": 3.3,
    "mixtral-8x22b": 140.6,
    "mixtral-8x7b": 46.703,
    "olmoe-1b-7b": 6.919,
    "openmoe-8b": 11.856,
    "qwen3-235b-a22b": 235.09,
    "qwen3-30b-a3b": 30.532,
}


@pytest.mark.parametrize("name", sorted(BILLIONS))
def test_known_models_have_the_published_number_of_parameters(name: str) -> None:
    found, config = find_model(name.upper())
    experts = len(config.moe_layers) * config.num_experts * config.expert_params
    one, two = (dense_parameters(shortened(config, layers)) for layers in (1, 2))
    dense = one + (len(config.moe_layers) - 1) * (two - one)  # the others are like the second
    assert found == name
    assert (dense + experts) / 1e9 == pytest.approx(BILLIONS[name], rel=5e-4)
    assert config.dtype == "bfloat16"


@pytest.mark.parametrize(("name", "layers"), [("deepseek-v2-lite", 27), ("deepseek-v3", 61), ("glm-4.7-flash", 47)])
def test_latent_attention_keeps_one_vector_of_a_token(name: str, layers: int) -> None:
    """512 numbers for keys and values, and 64 of a key: DeepSeek-V2's paper has the formula."""
    _, config = find_model(name)
    assert page_bytes(config, "bfloat16") == layers * PAGE_SIZE * (512 + 64) * 2


def test_every_known_model_is_among_these() -> None:
    assert set(known_models()) == set(BILLIONS)


def test_a_directory_and_its_config_are_the_same_model(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TINY))
    (folder / "other.json").write_text(json.dumps(TINY))
    expected = config_from_hf(TINY)
    assert find_model(str(folder)) == find_model(str(folder / "config.json")) == ("tiny", expected)
    assert find_model(str(folder / "other.json")) == ("other", expected)


def test_a_folder_wins_over_a_known_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mixtral-8x7b").mkdir()
    (tmp_path / "mixtral-8x7b" / "config.json").write_text(json.dumps(TINY))
    monkeypatch.chdir(tmp_path)
    assert find_model("mixtral-8x7b")[1] == config_from_hf(TINY)


def test_what_is_no_model_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'mixtral-8x7' is neither .* the nearest known one is 'mixtral-8x7b'"):
        find_model("mixtral-8x7")
    with pytest.raises(ConfigError, match="nearest known one is 'mixtral-8x7b'"):
        known_model("../models/mixtral-8x7b")
    with pytest.raises(CheckpointError, match="No such file"):
        find_model(str(tmp_path / "none.json"))
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ConfigError, match="holds a list"):
        read_config(tmp_path / "list.json")


def test_cards_come_by_memory_and_their_own_rates_by_efficiency() -> None:
    cards = cards_by_size(0.5)
    assert {card.name for card in cards} == set(CARDS)
    for small, large in itertools.pairwise(cards):  # of two that are sold as alike, one may have a little less
        assert small.memory_bytes <= large.memory_bytes + 2**30
        assert large.memory_bytes > small.memory_bytes + 2**30 or large.bandwidth >= small.bandwidth
    card = Target.of_card("h100-80gb", 0.5)
    assert card.memory_bytes == int(0.9 * 81_559 * 2**20)
    assert (card.bandwidth, card.flops("bfloat16"), card.flops("float32")) == (1.675e12, 494.5e12, 33.5e12)
    assert card.link == Target.of_card("h100-80gb", 1.0).link == 52e9


@pytest.mark.parametrize(("given", "nearest"), [("h100", "h100-80gb"), ("a100", "a100-40gb"), ("rtx4080", "rtx4090")])
def test_an_unknown_card_is_one_line_with_the_nearest(given: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=f"device '{given}' is not known; the nearest known one is '{nearest}' of l4"):
        Target.of_card(given)
