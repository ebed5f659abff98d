"""The parts of a layer that a whole step calls: XLA:CPU optimises one for all layers of a kind."""

import re
from collections import Counter

from emoe_jax.models import config_from_hf
from tests.device.test_lowering import CONFIG, DECODE, Pieces
from tests.lowering import export_for_cuda
from tests.models.test_hf_config import FAMILIES

CALL = re.compile(r'call @([\w.]+)\([^\n]*compilation_unit = "(\w+)"')


def units(pieces: Pieces) -> dict[str, Counter[str]]:
    """By unit: which functions the step calls as such, and how often."""
    function, arguments, statics = pieces.whole_step()
    found: dict[str, Counter[str]] = {}
    for callee, unit in CALL.findall(function.lower(*arguments, **statics).as_text()):
        found.setdefault(unit, Counter())[callee] += 1
    return found


def test_all_layers_of_a_kind_call_one_unit() -> None:
    found = units(Pieces(DECODE, 3, CONFIG, "cpu"))
    layers = CONFIG.num_layers
    assert layers == len(CONFIG.moe_layers) > 1
    assert {unit: list(calls.values()) for unit, calls in found.items()} == {"project": [layers], "moe": [layers]}


def test_layers_with_a_window_and_without_are_two_kinds() -> None:
    config = config_from_hf(FAMILIES["gpt_oss"])
    windows = Counter(config.sliding_window(layer) for layer in range(config.num_layers))
    assert len(windows) == 2
    found = units(Pieces(DECODE, config.top_k + 1, config, "cpu"))
    assert sorted(found["moe"].values()) == sorted(windows.values())


def test_a_layer_without_experts_is_a_unit_of_its_own() -> None:
    config = config_from_hf(FAMILIES["deepseek_v3"])
    dense = config.num_layers - len(config.moe_layers)
    assert dense > 0
    found = units(Pieces(DECODE, config.top_k + 1, config, "cpu"))
    assert sum(found["dense"].values()) == dense
    assert sum(found["moe"].values()) == len(config.moe_layers)


def test_a_gpu_has_no_units() -> None:
    function, arguments, statics = Pieces(DECODE, 3).whole_step()
    assert "compilation_unit" not in export_for_cuda(function, *arguments, **statics).mlir_module()
