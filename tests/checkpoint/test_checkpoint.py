"""Opening checkpoint directories: layouts, shards, tied heads; and directories that must be refused."""

import json
import re
import shutil
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from emoe_jax.errors import CheckpointError, ConfigError
from emoe_jax.experts.record_format import RecordFormat
from emoe_jax.models import load_dense, open_checkpoint, save_checkpoint
from tests.golden.tiny import CONFIGS, OPENMOE, random_tensors, write_checkpoint
from tests.models.loaded import load_experts

RAW = CONFIGS["mixtral_window"]
ALL = CONFIGS | {"openmoe": OPENMOE}


def edit_tensors(directory, change):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def edit_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def shard_of(directory, tensor):
    return json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"][tensor]


def edit_index(directory, change):
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


class TestReading:
    @pytest.mark.parametrize("shards", [1, 3])
    @pytest.mark.parametrize("layout", ["per_expert", "fused"])
    def test_record_is_the_expert(self, layout, shards, tmp_path):
        checkpoint = open_checkpoint(write_checkpoint(tmp_path, RAW, layout, shards=shards))
        expert_layout = RecordFormat.of(checkpoint.config, "float32")
        record = np.full(expert_layout.size, np.nan, np.float32)
        checkpoint.read_expert(2, 4, record, expert_layout)
        tensors = random_tensors(RAW)
        hub = "model.layers.2.block_sparse_moe.experts.4"
        expected = [tensors[f"{hub}.{name}.weight"].ravel() for name in ("w1", "w3", "w2")]
        np.testing.assert_array_equal(record, np.concatenate(expected))

    def test_family(self, tmp_path):
        checkpoint = open_checkpoint(write_checkpoint(tmp_path, RAW, "fused"))
        assert checkpoint.family.name == checkpoint.config.family == "mixtral"

    def test_dense_state(self, tmp_path):
        checkpoint = open_checkpoint(write_checkpoint(tmp_path, RAW))
        steps = []
        graphdef, state = load_dense(checkpoint, "float16", lambda done, total: steps.append((done, total)))
        model = nnx.merge(graphdef, state)
        tensors = random_tensors(RAW)
        qkv = [tensors[f"model.layers.1.self_attn.{p}_proj.weight"] for p in "qkv"]
        weight = model.layers[1].self_attention.qkv.weight[...]
        np.testing.assert_array_equal(weight, np.concatenate(qkv).astype(np.float16))
        assert steps == sorted(steps)
        assert steps[-1] == (checkpoint.dense_bytes, checkpoint.dense_bytes)

    def test_derived_tensors_are_accepted(self, tmp_path):
        write_checkpoint(tmp_path, CONFIGS["mixtral_llama3"])

        def change(tensors):
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
            tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(5, np.float32)

        edit_tensors(tmp_path, change)
        open_checkpoint(tmp_path)
        edit_tensors(tmp_path, lambda tensors: tensors["lm_head.weight"].__setitem__((95, 39), 7))
        with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
            open_checkpoint(tmp_path)

    def test_generation_config_has_the_end_tokens(self, tmp_path):
        write_checkpoint(tmp_path, RAW)
        assert open_checkpoint(tmp_path).config.eos_token_ids == (2,)
        (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 9]}')
        assert open_checkpoint(tmp_path).config.eos_token_ids == (2, 9)
        (tmp_path / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
        with pytest.raises(CheckpointError, match="eos_token_id is '</s>'"):
            open_checkpoint(tmp_path)

    def test_dtype_of_the_file_where_the_config_has_none(self, tmp_path):
        assert open_checkpoint(write_checkpoint(tmp_path, RAW, dtype=np.float16)).config.dtype == "float16"
        edit_config(tmp_path, torch_dtype="bfloat16")
        assert open_checkpoint(tmp_path).config.dtype == "bfloat16"

    def test_linked_shards(self, tmp_path):
        """The hub's cache holds links to blobs elsewhere."""
        original = write_checkpoint(tmp_path / "blobs", RAW)
        (tmp_path / "snapshot").mkdir()
        for file in original.iterdir():
            (tmp_path / "snapshot" / file.name).symlink_to(file)
        open_checkpoint(tmp_path / "snapshot")


class TestSaving:
    @pytest.mark.parametrize("layout", ["per_expert", "fused"])
    @pytest.mark.parametrize("name", ["mixtral_window", "olmoe_options", "qwen2_windows", "qwen3_tied", "openmoe"])
    def test_round_trip(self, name, layout, tmp_path):
        raw = ALL[name]
        original = open_checkpoint(write_checkpoint(tmp_path / "original", raw, layout))
        _, state = load_dense(original, "float32")
        save_checkpoint(tmp_path / "saved", raw, state, load_experts(original, "float32"), layout)
        expected = load_file(tmp_path / "original" / "model.safetensors")
        saved = load_file(tmp_path / "saved" / "model.safetensors")
        # Where layouts name the router differently, the published name is written.
        expected = {original.family.canonical(k): v for k, v in expected.items()}
        assert saved.keys() == expected.keys()
        for tensor, value in expected.items():
            np.testing.assert_array_equal(saved[tensor], value, err_msg=tensor)
        assert json.loads((tmp_path / "saved" / "config.json").read_text()) == raw

    def test_shards_replace_what_was_there(self, tmp_path):
        checkpoint = open_checkpoint(write_checkpoint(tmp_path / "original", RAW))
        _, state = load_dense(checkpoint, "bfloat16")
        experts = load_experts(checkpoint, "bfloat16")
        saved = tmp_path / "saved"
        save_checkpoint(saved, RAW, state, experts)
        (saved / "tokenizer.json").write_text("{}")
        save_checkpoint(saved, RAW, state, experts, max_shard_bytes=20_000)
        assert not (saved / "model.safetensors").exists()
        assert (saved / "tokenizer.json").exists()
        assert len(list(saved.glob("model-*.safetensors"))) > 2
        again = load_experts(open_checkpoint(saved), "bfloat16")
        np.testing.assert_array_equal(again[1].w_in, experts[1].w_in)
        save_checkpoint(saved, RAW, state, experts)
        assert {p.name for p in saved.iterdir()} == {"config.json", "model.safetensors", "tokenizer.json"}

    def test_failure_leaves_the_old_checkpoint(self, tmp_path):
        write_checkpoint(tmp_path, RAW)
        checkpoint = open_checkpoint(tmp_path)
        _, state = load_dense(checkpoint, "float32")
        experts = load_experts(checkpoint, "float32")
        before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
        with pytest.raises(AttributeError):
            save_checkpoint(tmp_path, RAW, state, [experts[0], experts[1], None])  # pyright: ignore[reportArgumentType]
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def remove(tensors, name):
    del tensors[name]


EXPERT = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
NORM = "model.norm.weight"
Q = "model.layers.0.self_attn.q_proj.weight"

BAD = {
    "config missing": (lambda d: (d / "config.json").unlink(), "config.json is missing"),
    "config not JSON": (lambda d: (d / "config.json").write_text("{"), "config.json is not valid JSON"),
    "config a list": (lambda d: (d / "config.json").write_text("[]"), "expected a JSON object"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "has neither model.safetensors nor"),
    "truncated": (
        lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:-5]),
        "beyond the file's",
    ),
    "expert missing": (lambda d: edit_tensors(d, lambda t: remove(t, EXPERT)), f"tensor {EXPERT} is missing"),
    "dense tensor missing": (lambda d: edit_tensors(d, lambda t: remove(t, NORM)), f"tensor {NORM} is missing"),
    "expert of another shape": (
        lambda d: edit_tensors(d, lambda t: t.update({EXPERT: np.zeros((24, 39), np.float32)})),
        f"tensor {EXPERT} has shape (24, 39); expected (24, 40)",
    ),
    "expert transposed": (
        lambda d: edit_tensors(d, lambda t: t.update({EXPERT: np.ascontiguousarray(t[EXPERT].T)})),
        f"tensor {EXPERT} has shape (40, 24); expected (24, 40)",
    ),
    "dense tensor of another shape": (
        lambda d: edit_tensors(d, lambda t: t.update({NORM: np.ones(41, np.float32)})),
        f"tensor {NORM} has shape (41,); expected (40,)",
    ),
    "q as small as k": (
        lambda d: edit_tensors(d, lambda t: t.update({Q: t[Q.replace("q_", "k_")].copy()})),
        f"tensor {Q} has shape (24, 40); expected (48, 40)",
    ),
    "integer weights": (
        lambda d: edit_tensors(d, lambda t: t.update({EXPERT: np.zeros((24, 40), np.int8)})),
        f"tensor {EXPERT} is I8; weights must be one of F32, F16, BF16",
    ),
    "double precision": (
        lambda d: edit_tensors(d, lambda t: t.update({NORM: np.ones(40)})),
        f"tensor {NORM} is F64",
    ),
    "tensor nobody reads": (
        lambda d: edit_tensors(d, lambda t: t.update({"model.adapter": np.zeros(1, np.float32)})),
        "tensor model.adapter is not part of mixtral",
    ),
    "fewer experts than configured": (
        lambda d: edit_config(d, num_local_experts=7),
        "has shape (6, 40); expected (7, 40)",
    ),
    "more experts than configured": (
        lambda d: edit_config(d, num_local_experts=5),
        "gate.weight has shape (6, 40); expected (5, 40)",
    ),
    "more layers than configured": (lambda d: edit_config(d, num_hidden_layers=2), "model.layers.2."),
}


@pytest.mark.parametrize("case", BAD)
def test_refuses(case, tmp_path):
    spoil, message = BAD[case]
    write_checkpoint(tmp_path, RAW)
    spoil(tmp_path)
    with pytest.raises(CheckpointError, match=re.escape(message)) as error:
        open_checkpoint(tmp_path)
    assert "\n" not in str(error.value)


SHARD = "model-00002-of-00003.safetensors"

BAD_SHARDS = {
    "shard missing": (lambda d: (d / SHARD).unlink(), f"{SHARD} is missing"),
    "shard truncated": (lambda d: (d / SHARD).write_bytes((d / SHARD).read_bytes()[:1000]), SHARD),
    "index not JSON": (lambda d: (d / "model.safetensors.index.json").write_text("no"), "is not valid JSON"),
    "index without map": (lambda d: (d / "model.safetensors.index.json").write_text("{}"), "has no weight_map"),
    "tensor in no shard": (
        lambda d: edit_index(d, lambda m: m.update({"model.extra": SHARD})),
        "tensor model.extra is missing, though",
    ),
    "tensor in another shard": (
        lambda d: edit_index(d, lambda m: m.update({NORM: SHARD if m[NORM] != SHARD else SHARD.replace("2-", "1-")})),
        f"tensor {NORM} is missing, though model.safetensors.index.json names it; it is in model-0000",
    ),
    "tensor not in the index": (lambda d: edit_index(d, lambda m: remove(m, NORM)), f"tensor {NORM} is not listed"),
    "path upwards": (
        lambda d: edit_index(d, lambda m: m.update({NORM: "../../model.safetensors"})),
        f"tensor {NORM} is mapped to '../../model.safetensors'",
    ),
    "absolute path": (
        lambda d: edit_index(d, lambda m: m.update({NORM: "/etc/passwd"})),
        f"tensor {NORM} is mapped to '/etc/passwd'",
    ),
    "not a name": (lambda d: edit_index(d, lambda m: m.update({NORM: 3})), f"tensor {NORM} is mapped to 3"),
    "pickle shards": (
        lambda d: edit_index(d, lambda m: m.update({NORM: "pytorch_model.bin"})),
        f"tensor {NORM} is mapped to 'pytorch_model.bin'",
    ),
}


@pytest.mark.parametrize("case", BAD_SHARDS)
def test_refuses_shards(case, tmp_path):
    spoil, message = BAD_SHARDS[case]
    write_checkpoint(tmp_path, RAW, shards=3)
    spoil(tmp_path)
    with pytest.raises(CheckpointError, match=re.escape(message)) as error:
        open_checkpoint(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "last.ckpt", "model.pkl"])
def test_never_unpickles(name, tmp_path):
    write_checkpoint(tmp_path, RAW)
    (tmp_path / "model.safetensors").rename(tmp_path / name)
    with pytest.raises(CheckpointError, match=f"holds its weights as {re.escape(name)}; pickle files"):
        open_checkpoint(tmp_path)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    write_checkpoint(tmp_path, RAW)
    edit_config(tmp_path, auto_map={"AutoModelForCausalLM": "modeling_evil.Evil", "AutoConfig": "modeling_evil.Config"})
    (tmp_path / "modeling_evil.py").write_text("raise SystemExit('ran')")
    open_checkpoint(tmp_path)


class TestLocation:
    def test_missing_directory(self, tmp_path):
        with pytest.raises(CheckpointError, match="does not exist"):
            open_checkpoint(tmp_path / "nothing")
        with pytest.raises(CheckpointError, match="does not exist"):
            open_checkpoint(str(tmp_path / "nothing"))

    def test_file(self, tmp_path):
        (tmp_path / "model.gguf").write_bytes(b"GGUF")
        with pytest.raises(CheckpointError, match="is a file"):
            open_checkpoint(tmp_path / "model.gguf")

    def test_revision_of_a_directory(self, tmp_path):
        with pytest.raises(CheckpointError, match="revision"):
            open_checkpoint(write_checkpoint(tmp_path, RAW), revision="main")

    def test_hub_id(self, tmp_path, monkeypatch):
        asked = {}

        def snapshot_download(repo_id, revision, allow_patterns):
            asked.update(repo_id=repo_id, revision=revision, allow_patterns=allow_patterns)
            return str(write_checkpoint(tmp_path, RAW))

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        assert open_checkpoint("someone/some-model", revision="v1").directory == tmp_path
        assert asked["repo_id"] == "someone/some-model"
        assert asked["revision"] == "v1"
        assert not any(
            Path("pytorch_model.bin").match(p) or Path("modeling.py").match(p) for p in asked["allow_patterns"]
        )

    def test_hub_id_offline(self, monkeypatch):
        def snapshot_download(*args, **kwargs):
            raise huggingface_hub.errors.LocalEntryNotFoundError("Got: no route to host\n\nCheck your connection.")

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        with pytest.raises(
            CheckpointError, match=r"could not be fetched from the Hugging Face hub: no route to host$"
        ) as error:
            open_checkpoint("someone/some-model")
        assert "\n" not in str(error.value)


def test_config_errors_come_first(tmp_path):
    """A model that is not supported is refused before its weights are looked at."""
    write_checkpoint(tmp_path, RAW)
    shutil.rmtree(tmp_path / "model.safetensors", ignore_errors=True)
    edit_config(tmp_path, quantization_config={"quant_method": "gptq"})
    with pytest.raises(ConfigError, match="quantization_config says GPTQ, which is not read"):
        open_checkpoint(tmp_path)
