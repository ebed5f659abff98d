"""Checkpoints in the quantised formats that models are published in: read as they are, and made floats."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from emoe_jax.checkpoint import Checkpoint
from emoe_jax.experts.record_format import RecordFormat
from emoe_jax.models import open_checkpoint
from tests.golden.packed import GPT_OSS, fp4_values, write_mxfp4
from tests.golden.tiny import prompts
from tests.models.loaded import load

WEIGHTS, CONFIG = "model.safetensors", "config.json"
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


class TestMxfp4:
    def test_a_record_has_the_bits_of_the_file(self, mxfp4: tuple[Path, Path]) -> None:
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

    def test_a_record_is_an_eighth_of_float32_and_its_scales(self) -> None:
        """Of an expert of gpt-oss-20b: 13.2 MB, where bfloat16 takes 49.8 MB. Its biases are 35 KB of that."""
        shapes = (5760, 2880), (2880, 2880)
        packed, plain = RecordFormat.mxfp4(*shapes), RecordFormat.plain(*shapes, np.dtype(np.float16))
        assert packed.nbytes == plain.nbytes // 4 + plain.nbytes // 64

    def test_plain_and_int8_records_are_made_of_it(self, mxfp4: tuple[Path, Path]) -> None:
        """Of which the twin's are made, too."""
        packed, floats = map(open_checkpoint, mxfp4)
        for name in ("float32", "bfloat16", "int8"):
            found = record(packed, name)
            for key, value in record(floats, name).items():
                np.testing.assert_array_equal(found[key], value)

    def test_logits_are_those_of_the_twin(self, mxfp4: tuple[Path, Path]) -> None:
        """As experts of four bits with the reference, too."""
        tokens = prompts(GPT_OSS)
        packed, floats = load(mxfp4[0]), load(mxfp4[1])
        want = floats.forward(tokens)[0]
        np.testing.assert_array_equal(packed.forward(tokens)[0], want)
        in_blocks = load(mxfp4[0], expert_format="mxfp4")
        assert in_blocks.experts[0].w_in.dtype == np.uint8
        np.testing.assert_allclose(in_blocks.forward(tokens)[0], want, atol=2e-4, rtol=0)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
    def test_transformers_makes_the_same_floats(self) -> None:
        torch = pytest.importorskip("torch", reason="needs the parity extra")
        from transformers.integrations.mxfp4 import convert_moe_packed_tensors

        rng = np.random.default_rng(0)
        blocks = rng.integers(0, 256, (2, 8, 3, 16)).astype(np.uint8)
        scales = rng.integers(60, 200, (2, 8, 3)).astype(np.uint8)
        theirs = convert_moe_packed_tensors(torch.tensor(blocks), torch.tensor(scales), dtype=torch.float32)
        np.testing.assert_array_equal(theirs.numpy().swapaxes(1, 2), fp4_values(blocks, scales))
