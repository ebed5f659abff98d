"""Mutants of how experts are kept: the option, the scales, the blocks, and what a checkpoint says of itself."""

from tests.mutants.mutant import Mutant

_ENGINE = "tests/engine/test_quantised.py"
_BACKENDS = "tests/moe/test_quantised.py::test_matches_the_reference_and_the_same_experts_in_float32"
_SHAPE = "('int8', 9, 2, 6, 2, 'glu', 18, 52)"
_MXFP4 = "('mxfp4', 9, 2, 6, 4, 'clamped_glu', 96, 32)"
_FP8 = "('fp8', 9, 2, 6, 4, 'double_glu', 144, 136)"
_PUBLISHED = "tests/checkpoint/test_published_formats.py"
_UNFIT = "tests/checkpoint/test_unfit_formats.py::test_what_does_not_fit_is_one_line"

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
        "            total = total * load_line(scales_ref.at[slot, pl.ds(first, tiling.tile)], wanted)\n",
        "            pass\n",
        (f"{_BACKENDS}[{_SHAPE}-triton-interpreted]",),
    ),
    Mutant(
        "mxfp4: halves of bytes",
        "the two numbers of a byte change places",
        "emoe_jax/moe/dequantise.py",
        "for half in (w & 15, w >> 4)",
        "for half in (w >> 4, w & 15)",
        (f"{_BACKENDS}[{_MXFP4}-loop]",),
    ),
    Mutant(
        "mxfp4: scales in the kernel",
        "numbers of four bits stay without the scales of their blocks",
        "emoe_jax/moe/tiles.py",
        "(twice_fp4(half) * scale for half",
        "(twice_fp4(half) for half",
        (f"{_BACKENDS}[{_MXFP4}-triton-interpreted]",),
    ),
    Mutant(
        "fp8: blocks of up",
        "the scales of up are taken from where the gate's are",
        "emoe_jax/moe/dequantise.py",
        "    return first // part * -(-part // FP8_BLOCK) + within // FP8_BLOCK\n",
        "    return within // FP8_BLOCK\n",
        (f"{_BACKENDS}[{_FP8}-loop]", f"{_BACKENDS}[{_FP8}-triton-interpreted]"),
    ),
    Mutant(
        "fp8: columns in the kernel",
        "all blocks of a row have the scale of the first",
        "emoe_jax/moe/tiles.py",
        "scale_rows(first, tile, self.part), at // FP8_BLOCK]",
        "scale_rows(first, tile, self.part), 0]",
        (f"{_BACKENDS}[{_FP8}-triton-interpreted]",),
    ),
    Mutant(
        "blocks: chunks",
        "an expert's weights in blocks become float32 as a whole",
        "emoe_jax/moe/loop.py",
        "_CHUNK_BYTES = 4 << 20\n",
        "_CHUNK_BYTES = 4 << 40\n",
        ("tests/moe/test_quantised.py::test_no_expert_is_dequantised_as_a_whole[1-mxfp4]",),
    ),
    Mutant(
        "mxfp4: rows in turn",
        "gate and up of a published checkpoint stay mixed",
        "emoe_jax/checkpoint/stored_format.py",
        "transposed=False)",
        "transposed=False, turns=1)",
        (f"{_PUBLISHED}::test_mxfp4_a_record_has_the_bits_of_the_file",),
    ),
    Mutant(
        "fp8: dense weights",
        "dense weights stay without the scales of their blocks",
        "emoe_jax/checkpoint/stored_weights.py",
        "                self.read_plain(part, target)\n",
        "                self.read((part,), target)\n",
        (f"{_PUBLISHED}::test_fp8_dense_weights_and_logits_are_those_of_the_twin[glm4_moe]",),
    ),
    Mutant(
        "mxfp4: no number",
        "a scale that is not a number reaches the slab",
        "emoe_jax/checkpoint/stored_weights.py",
        "if np.any(scales == MXFP4_NAN):",
        "if False:",
        (f"{_UNFIT}[mxfp4-no number]",),
    ),
    Mutant(
        "fp8: no number",
        "a weight that is not a number reaches the slab",
        "emoe_jax/checkpoint/stored_weights.py",
        'if self.file_dtype(stored) == "F8_E4M3" and has_fp8_nan(numbers):',
        "if False:",
        (f"{_UNFIT}[fp8-a weight that is no number]",),
    ),
    Mutant(
        "fp8: other blocks",
        "a checkpoint with other blocks is read as if it had those of 128 x 128",
        "emoe_jax/checkpoint/quantisation.py",
        "        if found != expected:\n",
        "        if False:\n",
        ("tests/checkpoint/test_unfit_formats.py::test_other_kinds_of_fp8_are_refused",),
    ),
)
