"""Checkpoints with experts in int8: written once, read as they are, and refused in one line where they do not fit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from emoe_jax.checkpoint import Checkpoint
from emoe_jax.checkpoint.convert import convert, main
from emoe_jax.errors import CheckpointError, ConfigError
from emoe_jax.experts.quantise import quantised
from emoe_jax.experts.record_format import RecordFormat
from emoe_jax.models import config_from_hf, load_dense, open_checkpoint
from tests.golden.tiny import CONFIGS, OPENMOE, write_checkpoint

ALL = CONFIGS | {"openmoe": OPENMOE}
RAW = ALL["mixtral_window"]
WEIGHTS, CONFIG = "model.safetensors", "config.json"
W1 = "model.layers.0.block_sparse_moe.experts.0.w1.weight"


def records(checkpoint: Checkpoint, name: str) -> np.ndarray:
    """All experts in a format, as bytes."""
    record_format = RecordFormat.of(checkpoint.config, name)
    found = np.empty(
        (len(checkpoint.config.moe_layers), checkpoint.config.num_experts, record_format.size), record_format.dtype
    )
    for layer, expert in np.ndindex(found.shape[:2]):
        checkpoint.read_expert(layer, expert, found[layer, expert], record_format)
    return found.view(np.uint8)


@pytest.mark.parametrize("layout", ["per_expert", "fused"])
@pytest.mark.parametrize("name", ["mixtral_window", "olmoe_options", "qwen2_windows", "qwen3_tied", "openmoe"])
def test_what_was_converted_has_the_bits_of_converting_while_loading(name: str, layout: Any, tmp_path: Path) -> None:
    source = open_checkpoint(write_checkpoint(tmp_path / "source", ALL[name], layout))
    convert(source, tmp_path / "int8", max_shard_bytes=20_000)
    converted = open_checkpoint(tmp_path / "int8")
    assert len(list((tmp_path / "int8").glob("*.safetensors"))) > 1
    assert converted.config == source.config.replace(expert_format="int8")
    np.testing.assert_array_equal(records(converted, "int8"), records(source, "int8"))
    for ours, theirs in zip(*(jax.tree.leaves(load_dense(c, "float32")[1]) for c in (converted, source)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_an_expert_is_read_as_its_parts_quantise(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, RAW))
    plain, eight = (RecordFormat.of(checkpoint.config, name) for name in ("float32", "int8"))
    record, small = np.empty(plain.size, np.float32), np.empty(eight.size, np.int8)
    checkpoint.read_expert(1, 2, record, plain)
    checkpoint.read_expert(1, 2, small, eight)
    for weights, numbers, scales in zip(
        plain.views(record), eight.views(small)[:2], eight.views(small)[2:], strict=True
    ):
        np.testing.assert_array_equal(numbers, quantised(weights)[0])
        np.testing.assert_array_equal(scales, quantised(weights)[1])


def test_plain_experts_are_made_of_quantised_ones(tmp_path: Path) -> None:
    """Tools that compute with float32 read a converted checkpoint, too."""
    convert(open_checkpoint(write_checkpoint(tmp_path / "source", RAW)), tmp_path / "int8")
    checkpoint = open_checkpoint(tmp_path / "int8")
    plain, eight = (RecordFormat.of(checkpoint.config, name) for name in ("float32", "int8"))
    record, small = np.empty(plain.size, np.float32), np.empty(eight.size, np.int8)
    checkpoint.read_expert(0, 1, record, plain)
    checkpoint.read_expert(0, 1, small, eight)
    for weights, numbers, scales in zip(
        plain.views(record), eight.views(small)[:2], eight.views(small)[2:], strict=True
    ):
        np.testing.assert_array_equal(weights, numbers * scales[:, None])


class TestTheCommand:
    def test_copies_what_belongs_to_the_model(self, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        source = write_checkpoint(tmp_path / "source", RAW)
        (source / "tokenizer.json").write_text("{}")
        (source / "predictor").mkdir()
        (source / "predictor" / "config.json").write_text("[]")
        (source / "pytorch_model.bin").write_text("large")
        out = tmp_path / "int8"
        assert main([str(source), str(out), "--expert-format", "int8"]) == 0
        assert "experts in int8" in capsys.readouterr().out
        names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
        assert names == {CONFIG, WEIGHTS, "tokenizer.json", "predictor/config.json"}
        wanted = RAW | {"quantization_config": {"quant_method": "emoe", "experts": "int8"}}
        assert json.loads((out / CONFIG).read_text()) == wanted

    def test_bad_input_is_one_line(self, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        source = write_checkpoint(tmp_path / "source", RAW)
        out = tmp_path / "int8"
        assert main([str(source), str(out), "--expert-format", "int8"]) == 0
        capsys.readouterr()
        for arguments, message in (
            ((source, out), f"{out} is there already; expected a directory that is not, or is empty"),
            ((out, tmp_path / "again"), f"{out} has experts in int8 already"),
            ((tmp_path / "nowhere", tmp_path / "again"), "does not exist"),
        ):
            assert main([*map(str, arguments), "--expert-format", "int8"]) == 2
            error = capsys.readouterr().err
            assert message in error
            assert error.count("\n") == 1


Change = Callable[[dict[str, np.ndarray]], Any]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop(f"{W1}_scale"),
            f"model.safetensors: tensor {W1}_scale is missing; config.json says int8 experts, so",
        ),
        (
            lambda t: t.update({f"{W1}_scale": np.ones(23, np.float32)}),
            rf"model.safetensors: tensor {W1}_scale has shape \(23,\); expected \(24,\)",
        ),
        (
            lambda t: t.update({f"{W1}_scale": np.ones(24, np.float16)}),
            f"model.safetensors: tensor {W1}_scale is F16; expected F32, as config.json says int8 experts",
        ),
        (
            lambda t: t.update({W1: np.zeros((24, 40), np.float32)}),
            f"model.safetensors: tensor {W1} is F32; expected I8, as config.json says int8 experts",
        ),
        (
            lambda t: t.update({"model.norm.weight": np.zeros(40, np.int8)}),
            "model.safetensors: tensor model.norm.weight is I8; weights must be one of F32, F16, BF16",
        ),
        (lambda t: t.update(more_scale=np.ones(2, np.float32)), "tensor more_scale is not part of mixtral"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change: Change, message: str, tmp_path: Path) -> None:
    convert(open_checkpoint(write_checkpoint(tmp_path / "source", RAW)), tmp_path / "int8")
    tensors = load_file(tmp_path / "int8" / WEIGHTS)
    change(tensors)
    save_file(tensors, tmp_path / "int8" / WEIGHTS)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(tmp_path / "int8")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -1.0])
@pytest.mark.parametrize("name", ["int8", "float32"])
def test_scales_that_are_no_scales_are_named(wrong: float, name: str, tmp_path: Path) -> None:
    convert(open_checkpoint(write_checkpoint(tmp_path / "source", RAW)), tmp_path / "int8")
    tensors = load_file(tmp_path / "int8" / WEIGHTS)
    tensors[f"{W1}_scale"] = tensors[f"{W1}_scale"].copy()
    tensors[f"{W1}_scale"][3] = wrong
    save_file(tensors, tmp_path / "int8" / WEIGHTS)
    message = f"{WEIGHTS}: tensor {W1}_scale has scales that are negative or not finite; expected finite numbers from 0"
    with pytest.raises(CheckpointError, match=message):
        records(open_checkpoint(tmp_path / "int8"), name)


def test_weights_that_are_not_finite_are_not_quantised(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source", RAW)
    tensors = load_file(tmp_path / "source" / WEIGHTS)
    tensors[W1] = np.full_like(tensors[W1], np.nan)
    save_file(tensors, tmp_path / "source" / WEIGHTS)
    checkpoint = open_checkpoint(tmp_path / "source")
    with pytest.raises(CheckpointError, match=f"{W1} has values that are not finite"):
        records(checkpoint, "int8")
    with pytest.raises(CheckpointError, match=f"{W1} has values that are not finite"):
        convert(checkpoint, tmp_path / "int8")
    assert not (tmp_path / "int8" / CONFIG).exists()


def test_int8_that_config_json_does_not_mention_is_refused(tmp_path: Path) -> None:
    convert(open_checkpoint(write_checkpoint(tmp_path / "source", RAW)), tmp_path / "int8")
    (tmp_path / "int8" / CONFIG).write_text(json.dumps(RAW))
    with pytest.raises(CheckpointError, match=f"tensor {W1} is I8; weights must be one of F32, F16, BF16"):
        open_checkpoint(tmp_path / "int8")


@pytest.mark.parametrize("name", ["mixtral_window", "openmoe"])
@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"quant_method": "awq", "bits": 4}, "AWQ"),
        ({"quant_method": "gptq", "bits": 4}, "GPTQ"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "FP8"),
        ({"quant_method": "mxfp4"}, "MXFP4"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "gguf"}, "GGUF"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, r"NVFP4 \(modelopt\)"),
        ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, r"NVFP4 \(compressed-tensors\)"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, r"compressed-tensors \(pack-quantized\)"),
        ({"quant_method": "emoe", "experts": "int3"}, "experts in 'int3'"),
        ({"bits": 4}, "no quant_method"),
    ],
)
def test_other_formats_are_refused_by_name(name: str, config: dict[str, Any], says: str) -> None:
    family = name.partition("_")[0]
    message = f"^config.json: quantization_config says {says}, which is not read for {family}; use .* --expert-format"
    with pytest.raises(ConfigError, match=message):
        config_from_hf(ALL[name] | {"quantization_config": config})


def test_gguf_files_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text(json.dumps(RAW))
    (tmp_path / "model-Q4_K_M.gguf").write_text("GGUF")
    with pytest.raises(CheckpointError, match=r"model-Q4_K_M.gguf; GGUF is not read, use .* --expert-format int8"):
        open_checkpoint(tmp_path)
