"""Measured tile sizes: kept in a file, used by the Triton backend, and left alone where they are of others."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from emoe_jax.experts.record_format import RecordFormat
from emoe_jax.moe import kernel_choice
from emoe_jax.moe.kernel_choice import KernelKey, choice_file, save_choice, table_for, use_choice
from emoe_jax.moe.kernel_config import DEFAULT_TABLE, KernelConfig, KernelTable
from tests.moe.cases import OP, abstract_operands, model

CONFIG = model(4, 2)
KEY = KernelKey.of(CONFIG, "float32", "float32")
CARD = "NVIDIA Test 5000"
NARROW = KernelConfig(rows=16, tile_in=16, tile_out=16, depth=16, warps=4, stages=2, programs=1)
TABLE = KernelTable((4,), (NARROW, DEFAULT_TABLE.configs[0]))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield tmp_path
    monkeypatch.setattr(kernel_choice, "_IN_USE", {})
    jax.clear_caches()


def test_what_is_kept_is_used_for_these_experts_only() -> None:
    assert use_choice(KEY, CARD) is None
    path = save_choice(KEY, CARD, TABLE, [{"seconds": 1.0}])
    assert use_choice(KEY, CARD) == path == choice_file(KEY, CARD)
    for name in ("float32", "bfloat16", "int8", "fp8", "mxfp4"):
        experts = RecordFormat.of(CONFIG.replace(expert_hidden=64), name).empty_weights(4)
        other = table_for(CONFIG.replace(expert_hidden=64), "float32", experts)
        assert other == DEFAULT_TABLE
    own = RecordFormat.of(CONFIG, "float32").empty_weights(4)
    assert table_for(CONFIG, jnp.dtype("float32"), own) == TABLE
    assert table_for(CONFIG, "bfloat16", own) == DEFAULT_TABLE
    assert use_choice(KEY, "NVIDIA Other") is None
    assert table_for(CONFIG, "float32", own) == DEFAULT_TABLE


@pytest.mark.parametrize("name", ["float32", "bfloat16", "int8", "fp8", "mxfp4"])
def test_the_format_is_told_from_the_arrays(name: str) -> None:
    config = CONFIG.replace(expert_hidden=64)
    key = KernelKey.of(config, "float32", name)
    save_choice(key, CARD, TABLE, None)
    use_choice(key, CARD)
    assert table_for(config, "float32", RecordFormat.of(config, name).empty_weights(4)) == TABLE


def test_the_op_is_traced_with_the_sizes_in_use() -> None:
    """Also where it was traced with others before. A program multiplies so many rows with so many outputs."""

    def grids() -> list[tuple[int, ...]]:
        operands = abstract_operands(CONFIG, 1, 4, "float32")
        jaxpr = jax.make_jaxpr(lambda *given: OP(*given, config=CONFIG, backend="triton-interpreted"))(*operands)
        found = []

        def visit(inner: Any) -> None:
            for equation in inner.eqns:
                if equation.primitive.name == "pallas_call":
                    found.append(equation.params["grid_mapping"].grid)
                for value in equation.params.values():
                    if hasattr(value, "jaxpr"):
                        visit(value.jaxpr)

        visit(jaxpr.jaxpr)
        return found

    before = grids()
    assert [grid[1] for grid in before] == [2, 1]  # 48 features in tiles of 32, and 32 in one
    save_choice(KEY, CARD, TABLE, None)
    use_choice(KEY, CARD)
    assert [grid[1] for grid in grids()] == [3, 2]  # tiles of 16
    use_choice(KEY, "NVIDIA Other")
    assert grids() == before


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"jax": "0.0.1"}, "its jax is '0.0.1'"),
        ({"device_kind": "NVIDIA Other"}, "its device_kind is 'NVIDIA Other'"),
        ({"experts": {"hidden": 1}}, "its experts is"),
        ({"limits": [4, 4]}, "2 sets of tile sizes for 2 limits"),
        ({"configs": [{"rows": 17}]}, "unexpected|missing"),
        ({"limits": None}, "NoneType"),
        ("{", "Expecting"),
        ("[]", "list indices"),
    ],
)
def test_a_broken_or_foreign_file_is_one_warning(
    change: dict[str, object] | str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = save_choice(KEY, CARD, TABLE, None)
    path.write_text(change if isinstance(change, str) else json.dumps(json.loads(path.read_text()) | change))
    with caplog.at_level(logging.WARNING):
        assert use_choice(KEY, CARD) is None
    [record] = caplog.records
    assert record.getMessage().startswith(f"ignored the measured tile sizes in {path}: ")
    assert "\n" not in record.getMessage()
    assert any(part in record.getMessage() for part in reason.split("|"))
    assert table_for(CONFIG, "float32", RecordFormat.of(CONFIG, "float32").empty_weights(4)) == DEFAULT_TABLE


def test_names_of_files_tell_devices_and_experts_apart() -> None:
    others = {choice_file(KEY, CARD), choice_file(KEY, "x"), choice_file(KEY._replace(top_k=1), CARD)}
    assert len(others) == 3
    assert choice_file(KEY, CARD).name.startswith("nvidia-test-5000-")
