"""Mutants of how experts are kept: the option, the scales, and what a checkpoint says of itself."""

from tests.mutants.mutant import Mutant

_ENGINE = "tests/engine/test_quantised.py"
_BACKENDS = "tests/moe/test_quantised.py::test_matches_the_reference_and_the_same_experts_in_float32"
_SHAPE = "(9, 2, 6, 2, 'glu', 18, 52)"

FORMATS = (
    Mutant(
        "expert format",
        "the memory plan is not told of the format",
        "emoe_jax/memory/requested.py",
        "        expert_format=options.expert_format,\n",
        "",
        (f"{_ENGINE}::test_the_slab_is_int8_and_nothing_else_is",),
    ),
    Mutant(
        "stored format",
        "an engine does not go by what config.json says of the experts",
        "emoe_jax/memory/plan.py",
        "expert_format = config.expert_format or dtype",
        "expert_format = dtype",
        (f"{_ENGINE}::test_a_converted_checkpoint_gives_the_same_bits",),
    ),
    Mutant(
        "scales: loop",
        "vector products stay without the scales of their channels",
        "emoe_jax/moe/loop.py",
        "return scaled(total, slot_scales(scales, slot, first, step))",
        "return total",
        (f"{_BACKENDS}[{_SHAPE}-loop]",),
    ),
    Mutant(
        "scales: triton",
        "the second kernel's sums stay without the scales of their channels",
        "emoe_jax/moe/triton.py",
        "            total = total * _load_line(scales_ref.at[slot, pl.ds(first, tiling.tile)], wanted)\n",
        "            pass\n",
        (f"{_BACKENDS}[{_SHAPE}-triton-interpreted]",),
    ),
)
