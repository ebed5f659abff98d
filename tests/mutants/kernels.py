"""Mutants of measured tile sizes: what the engine reads, and what the op is traced with."""

from tests.mutants.mutant import Mutant

KERNELS = (
    Mutant(
        "tile sizes: engine",
        "an engine does not look for what was measured on its device",
        "emoe_jax/engine/loading.py",
        "    kernels = used_kernels(config, first.dtype, first.expert_format)\n",
        "    kernels = None\n",
        ("tests/benchmarks/test_bench_kernels.py::test_a_loaded_engine_has_looked_for_the_choice",),
    ),
    Mutant(
        "tile sizes: op",
        "the kernels are traced with the default sizes",
        "emoe_jax/moe/kernel_choice.py",
        "_IN_USE.get(KernelKey.of(config, str(dtype), _format_of(experts)), DEFAULT_TABLE)\n",
        "DEFAULT_TABLE\n",
        ("tests/moe/test_kernel_choice.py::test_the_op_is_traced_with_the_sizes_in_use",),
    ),
    Mutant(
        "tile sizes: traced before",
        "steps that were traced before keep the sizes that they had",
        "emoe_jax/moe/kernel_choice.py",
        "        jax.clear_caches()  # what was traced so far has the other tile sizes\n",
        "        pass\n",
        ("tests/moe/test_kernel_choice.py::test_the_op_is_traced_with_the_sizes_in_use",),
    ),
)
