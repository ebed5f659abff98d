"""What earlier processes compiled, and what a GPU's compiler found out, is kept on disk."""

from pathlib import Path

import jax
import pytest
from jax._src import compiler

from serve.start import keep_compilations


def test_a_compilers_measurements_are_kept_beside_the_executables(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = {name: getattr(jax.config, name) for name in ("jax_compilation_cache_dir", "jax_enable_compilation_cache")}
    least = jax.config.jax_persistent_cache_min_compile_time_secs  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        keep_compilations()
        jax.config.update("jax_enable_compilation_cache", True)
        options = compiler.get_compile_options(num_replicas=1, num_partitions=1)
        found = Path(options.executable_build_options.debug_options.xla_gpu_per_fusion_autotune_cache_dir)
        assert found.parent == tmp_path / "emoe-jax" / "xla"
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", least)
