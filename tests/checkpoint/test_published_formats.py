"""Checkpoints in the quantised formats that models are published in: read as they are, and made floats."""

from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from emoe_jax.checkpoint import Checkpoint
from emoe_jax.errors import CheckpointError
from emoe_jax.experts.blocks import dequantise_fp8_into
from emoe_jax.experts.record_format import RecordFormat
from emoe_jax.models import open_checkpoint
from tests.golden.packed import FP8, FP8_CONFIG, GPT_OSS, fp4_values, fp8_tensors, fused, write, write_fp8, write_mxfp4
from tests.golden.tiny import prompts
from tests.models.loaded import load

WEIGHTS = "model.safetensors"
EXPERTS = "model.layers.1.mlp.experts"


def record(checkpoint: Checkpoint, name: str, layer: int = 1, expert: int = 2) -> dict[str, np.ndarray]:
    """The arrays of one expert in a format."""
    record_format = RecordFormat.of(checkpoint.config, name)
    numbers = np.empty(record_format.size, record_format.dtype)
    checkpoint.read_expert(layer, expert, numbers, record_format)
    names = (array.name for array in record_format.arrays)
    return dict(zip(names, record_format.views(numbers), strict=True))


@pytest.fixture(scope="module")
def mxfp4(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint of gpt-oss, and its twin."""
    return write_mxfp4(tmp_path_factory.mktemp("mxfp4"))


def test_mxfp4_a_record_has_the_bits_of_the_file(mxfp4: tuple[Path, Path]) -> None:
    """Gate rows, then up rows, which the file has in turn."""
    checkpoint = open_checkpoint(mxfp4[0])
    assert checkpoint.config.expert_format == "mxfp4"
    stored, found = load_file(mxfp4[0] / WEIGHTS), record(checkpoint, "mxfp4")
    for ours, theirs in (("w", "blocks"), ("in_scales", "scales")):
        array = stored[f"{EXPERTS}.gate_up_proj_{theirs}"][2]
        in_turn = np.concatenate([array[::2], array[1::2]]).reshape(len(array), -1)
        np.testing.assert_array_equal(found["w_in" if ours == "w" else ours], in_turn)
    np.testing.assert_array_equal(
        found["w_out"], stored[f"{EXPERTS}.down_proj_blocks"][2].reshape(found["w_out"].shape)
    )
    np.testing.assert_array_equal(found["out_scales"], stored[f"{EXPERTS}.down_proj_scales"][2])
    assert found["b_in"].dtype == np.float32


def test_mxfp4_a_record_is_an_eighth_of_float32_and_its_scales() -> None:
    """Of an expert of gpt-oss-20b: 13.2 MB, where bfloat16 takes 49.8 MB. Its biases are 35 KB of that."""
    shapes = (5760, 2880), (2880, 2880)
    packed, plain = RecordFormat.mxfp4(*shapes), RecordFormat.plain(*shapes, np.dtype(np.float16))
    assert packed.nbytes == plain.nbytes // 4 + plain.nbytes // 64


def test_mxfp4_plain_and_int8_records_are_made_of_it(mxfp4: tuple[Path, Path]) -> None:
    """Of which the twin's are made, too."""
    packed, floats = map(open_checkpoint, mxfp4)
    for name in ("float32", "bfloat16", "int8"):
        found = record(packed, name)
        for key, value in record(floats, name).items():
            np.testing.assert_array_equal(found[key], value)


def test_mxfp4_logits_are_those_of_the_twin(mxfp4: tuple[Path, Path]) -> None:
    """As experts of four bits with the reference, too."""
    tokens = prompts(GPT_OSS)
    packed, floats = load(mxfp4[0]), load(mxfp4[1])
    want = floats.forward(tokens)[0]
    np.testing.assert_array_equal(packed.forward(tokens)[0], want)
    in_blocks = load(mxfp4[0], expert_format="mxfp4")
    assert in_blocks.experts[0].w_in.dtype == np.uint8
    np.testing.assert_allclose(in_blocks.forward(tokens)[0], want, atol=2e-4, rtol=0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_mxfp4_transformers_makes_the_same_floats() -> None:
    torch = pytest.importorskip("torch", reason="needs the parity extra")
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (2, 8, 3, 16)).astype(np.uint8)
    scales = rng.integers(60, 200, (2, 8, 3)).astype(np.uint8)
    theirs = convert_moe_packed_tensors(torch.tensor(blocks), torch.tensor(scales), dtype=torch.float32)
    np.testing.assert_array_equal(theirs.numpy().swapaxes(1, 2), fp4_values(blocks, scales))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_fp8_transformers_makes_the_same_floats() -> None:
    """In whole blocks: transformers takes no others."""
    torch = pytest.importorskip("torch", reason="needs the parity extra")
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    rng = np.random.default_rng(0)
    numbers = np.arange(256 * 384, dtype=np.uint32).astype(np.uint8).reshape(256, 384)
    numbers[has_no_value := (numbers & 0x7F) == 0x7F] = 0
    assert has_no_value.any()
    scales = rng.uniform(1e-4, 2, (2, 3)).astype(np.float32)
    stored = torch.tensor(numbers).view(torch.float8_e4m3fn)
    theirs = Fp8Dequantize(None)._dequantize_one(stored, torch.tensor(scales), torch.float32)
    ours = np.empty(numbers.shape, np.float32)
    dequantise_fp8_into(numbers, scales, ours)
    np.testing.assert_array_equal(ours, theirs.numpy())


@pytest.fixture(scope="module", params=FP8)
def fp8(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """A family, a checkpoint of it, and the checkpoint's twin."""
    return request.param, *write_fp8(tmp_path_factory.mktemp(request.param), request.param)


def test_fp8_a_record_has_the_bits_of_the_file(fp8: tuple[str, Path, Path]) -> None:
    """The blocks of up begin where the gate's have ended, although 136 rows are no whole blocks."""
    checkpoint = open_checkpoint(fp8[1])
    assert checkpoint.config.expert_format == "fp8"
    layer = checkpoint.config.moe_layers[1]
    (stored, _), found = fp8_tensors(*FP8[fp8[0]]), record(checkpoint, "fp8")
    for ours, projections in (("in", ("gate_proj", "up_proj")), ("out", ("down_proj",))):
        names = [f"model.layers.{layer}.mlp.experts.2.{projection}.weight" for projection in projections]
        numbers = np.concatenate([stored[name] for name in names])
        np.testing.assert_array_equal(found[f"w_{ours}"], numbers.view(np.uint8))
        scales = np.concatenate([stored[f"{name}_scale_inv"] for name in names]).astype(np.float32)
        assert scales.shape == (2 * len(projections), 2)
        np.testing.assert_array_equal(found[f"{ours}_scales"], scales)


def test_fp8_a_record_is_a_quarter_of_float32() -> None:
    """Of an expert of Qwen3-30B-A3B: its scales are 0.2 per mille."""
    shapes = (1536, 2048), (2048, 768)
    packed, plain = RecordFormat.fp8(*shapes), RecordFormat.plain(*shapes, np.dtype(np.float32))
    assert packed.nbytes == plain.nbytes // 4 + 4 * 3 * 6 * 16


def test_fp8_plain_and_int8_records_are_made_of_it(fp8: tuple[str, Path, Path]) -> None:
    packed, floats = map(open_checkpoint, fp8[1:])
    for name in ("float32", "bfloat16", "int8"):
        found = record(packed, name)
        for key, value in record(floats, name).items():
            np.testing.assert_array_equal(found[key], value)


def test_fp8_dense_weights_and_logits_are_those_of_the_twin(fp8: tuple[str, Path, Path]) -> None:
    packed, floats = load(fp8[1], expert_format="fp8"), load(fp8[2])
    for ours, theirs in zip(*map(jax.tree.leaves, (packed.state, floats.state)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert packed.experts[0].w_in.dtype == np.uint8
    tokens = prompts(FP8[fp8[0]][0])
    want = floats.forward(tokens)[0]
    np.testing.assert_allclose(packed.forward(tokens)[0], want, atol=2e-4, rtol=0)


def test_fp8_stacks_are_read_where_gate_and_up_are_whole_blocks(tmp_path: Path) -> None:
    raw = FP8["qwen3_moe"][0] | {"moe_intermediate_size": 128}
    packed, _ = fp8_tensors(raw, np.float32)
    config = raw | {"quantization_config": FP8_CONFIG}
    stacks, single = write(tmp_path / "stacks", config, fused(packed)), write(tmp_path / "single", config, packed)
    found = record(open_checkpoint(stacks), "fp8")
    for key, value in record(open_checkpoint(single), "fp8").items():
        np.testing.assert_array_equal(found[key], value)


def test_fp8_stacks_of_other_sizes_are_refused(fp8: tuple[str, Path, Path], tmp_path: Path) -> None:
    raw, scale_dtype = FP8[fp8[0]]
    packed, _ = fp8_tensors(raw, scale_dtype)
    write(tmp_path, raw | {"quantization_config": FP8_CONFIG}, fused(packed))
    with pytest.raises(CheckpointError, match=r"gate_up_proj has a gate of 136 rows; .* a multiple of 128"):
        open_checkpoint(tmp_path)
