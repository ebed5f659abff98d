"""What an engine is slow at is said with the reason, and nothing where there is no reason."""

from typing import Any

import pytest

from emoe_jax.memory.plan import MemoryPlan
from emoe_jax.models import config_from_hf
from emoe_jax.planning.catalogue import known_model
from emoe_jax.planning.slow import slow_parts
from tests.engines import TINY

TINY_CONFIG = config_from_hf(TINY)
MIXTRAL = config_from_hf(known_model("mixtral-8x7b") | {"num_hidden_layers": 2})
ALL_IN_HOST: dict[str, Any] = {"machine_bytes": 1 << 40}


def lines(config: Any = TINY_CONFIG, contract: Any = "exact", platform: str = "gpu", **options: Any) -> list[str]:
    defaults = {"expert_memory": "50%", "dtype": "float32", "device_bytes": 1 << 36}
    plan = MemoryPlan.of(config, platform=platform, **defaults | options)
    return list(slow_parts(config, plan, contract, platform))


def test_where_all_experts_are_resident_nothing_is_slow() -> None:
    assert lines(expert_memory="100%") == []


def test_half_precision_on_a_cpu() -> None:
    [line] = lines(platform="cpu", dtype="bfloat16", expert_memory="100%")
    assert line.startswith("products of bfloat16 are slow on a CPU; --dtype float32")
    assert lines(platform="gpu", dtype="bfloat16", expert_memory="100%") == []


def test_experts_that_only_files_have() -> None:
    [line] = lines(contract="resident", host_memory=7 * 9_216)
    assert line.startswith("5 of 24 experts have room neither on the device nor in host memory")
    assert "--host-memory 1MiB keeps them all" in line
    assert lines(contract="resident", host_memory="1MiB") == []
    assert lines(contract="resident", **ALL_IN_HOST) == []


@pytest.mark.parametrize(("platform", "is_slow"), [("gpu", True), ("cpu", False)])
def test_waiting_for_experts_where_the_link_is_slower_than_memory(platform: str, is_slow: bool) -> None:
    waits = [line for line in lines(MIXTRAL, platform=platform, **ALL_IN_HOST) if "a token may wait for" in line]
    assert len(waits) == is_slow
    if is_slow:  # two layers, two choices each, of which half miss an expert of 705 MB
        assert "with 50% of the experts resident, a token may wait for 1.312 GiB of experts" in waits[0]
    assert lines(MIXTRAL, contract="resident", platform=platform, **ALL_IN_HOST) == []
