"""What XLA is told of a GPU's memory, by what the user said and what is installed."""

import os
import sys
from pathlib import Path

import pytest

from emoe_jax.memory.device_settings import POOL_SHARE, gpu_settings, has_gpu_plugin, pool_share, prepare_devices

SHARE, OLD_SHARE = "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"
LIMIT = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"
BOTH = {SHARE: str(POOL_SHARE), LIMIT: "64"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, BOTH),
        ({"JAX_PLATFORMS": "cuda,cpu"}, BOTH),
        ({"JAX_PLATFORMS": "CUDA"}, BOTH),
        ({"JAX_PLATFORMS": "cpu"}, {}),
        ({"JAX_PLATFORMS": "tpu"}, {}),
        ({SHARE: "0.5"}, {LIMIT: "64"}),
        ({OLD_SHARE: "0.5"}, {LIMIT: "64"}),
        ({SHARE: ""}, BOTH),  # as JAX reads it
        ({"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}, {LIMIT: "64"}),
        ({"XLA_PYTHON_CLIENT_ALLOCATOR": "platform"}, {LIMIT: "64"}),
        ({LIMIT: "7"}, {SHARE: str(POOL_SHARE)}),
    ],
)
def test_what_the_user_said_stays(environment: dict[str, str], expected: dict[str, str]) -> None:
    assert gpu_settings(environment, (64 << 30) - 5, has_plugin=True) == expected
    assert gpu_settings(environment, 64 << 30, has_plugin=False) == {}


def test_settings_reach_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (SHARE, OLD_SHARE, LIMIT, "JAX_PLATFORMS", "XLA_PYTHON_CLIENT_PREALLOCATE"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "empty")])
    assert not has_gpu_plugin()
    prepare_devices(3 << 30)
    assert os.environ[SHARE] == ""
    (tmp_path / "jax_plugins" / "xla_cuda13").mkdir(parents=True)
    (tmp_path / "jax_plugins" / "xla_cuda13" / "__init__.py").touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert has_gpu_plugin()
    prepare_devices(3 << 30)
    assert (os.environ[SHARE], os.environ[LIMIT]) == (str(POOL_SHARE), "3")


@pytest.mark.parametrize(
    ("environment", "share"),
    [
        ({}, 0.75),
        ({SHARE: "0.9"}, 0.9),
        ({OLD_SHARE: "0.6"}, 0.6),
        ({SHARE: "0.9", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}, None),
        ({SHARE: "0.9", "XLA_PYTHON_CLIENT_ALLOCATOR": "platform"}, None),
        ({SHARE: "0.9", "XLA_PYTHON_CLIENT_ALLOCATOR": "bfc"}, 0.9),
    ],
)
def test_the_share_of_the_pool(environment: dict[str, str], share: float | None) -> None:
    assert pool_share(environment, "gpu") == share
    assert pool_share(environment, "cpu") is None
