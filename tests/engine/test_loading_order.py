"""On a GPU, steps are compiled while the memory of slab and KV cache is still free: compilers try kernels out there."""

from pathlib import Path
from typing import Any

import pytest

from emoe_jax import Engine
from emoe_jax.device import step
from emoe_jax.device.executables import Executables
from emoe_jax.engine import loading
from emoe_jax.experts.slab import ExpertSlab


@pytest.mark.parametrize("platform", ["gpu", "cpu"])
def test_steps_are_compiled_before_memory_is_taken(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, platform: str
) -> None:
    done: list[Any] = []

    def noted(owner: Any, method: str, name: str) -> None:
        call = getattr(owner, method)

        def wrapper(*args: Any, **keywords: Any) -> Any:
            done.append(name)
            return call(*args, **keywords)

        monkeypatch.setattr(owner, method, wrapper)

    def compile_nothing(_: Executables, function: Any, key: Any, *args: Any, **static: Any) -> None:
        done.append((function, key))

    compiles_first = loading.compiles_first
    monkeypatch.setattr(loading, "compiles_first", lambda _: compiles_first(platform))
    monkeypatch.setattr(Executables, "compile", compile_nothing)
    noted(ExpertSlab, "__init__", "slab")
    noted(loading, "new_cache", "KV cache")
    options: dict[str, Any] = {"max_num_seqs": 2, "max_num_batched_tokens": 32, "expert_memory": "100%"}
    stages: list[str] = []
    with Engine.load(tiny_checkpoint, progress=lambda stage, *_: stages.append(stage), **options) as engine:
        assert done.index("slab") < done.index("KV cache")
        before, runner = done[: done.index("slab")], engine.parts.runner
        compiled = {key for function, key in before if function is step.whole_step}
        warm_up: list[Any] = []
        monkeypatch.setattr(Executables, "compile", lambda _, function, key, *rest, **static: warm_up.append(key))
        for shape in runner.buckets.shapes:
            runner._compile_whole(shape)
        assert compiled == (set(warm_up) if platform == "gpu" else set())  # the keys that the engine looks for
        assert ("compile" in stages) == (platform == "gpu")
