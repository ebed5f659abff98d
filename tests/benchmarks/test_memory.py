"""Memory of a tiny model worked out by hand, the engine's own plan, and the command."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.memory.__main__ import main
from benchmarks.memory.compiled import step_bytes
from benchmarks.memory.geometries import GEOMETRIES
from benchmarks.memory.needs import Needs, Workload, measure, pages_on
from emoe_jax.config import ModelConfig
from emoe_jax.errors import CapacityError
from emoe_jax.memory.plan import MemoryPlan
from emoe_jax.models import config_from_hf
from emoe_jax.planning.catalogue import read_config
from tests.engines import TINY

CONFIG = config_from_hf(TINY)
# D 32, F 24, L 3, N 4, K 2, H 8, E 8, V 61; 4 bytes per number.
EXPERT = 4 * (2 * 24 * 32 + 32 * 24)
PAGE = 4 * 3 * 16 * 2 * 2 * 8
ATTENTION, NORMS, ROUTER = 32 * 32 + 2 * 32 * 16 + 32 * 32, 2 * 32, 8 * 32
WEIGHTS = 4 * (2 * 61 * 32 + 32 + 3 * (ATTENTION + NORMS + ROUTER))
LOAD = Workload(prompt_length=32, batch=2, output_tokens=0)  # four pages
DEVICE = 500_000


def test_needs_by_hand():
    assert (WEIGHTS, EXPERT, PAGE) == (56_448, 9_216, 6_144)
    full, half = (Needs.of(CONFIG, share, "float32") for share in (1.0, 0.5))
    assert full == Needs(24, WEIGHTS, 3 * 8 * EXPERT, PAGE)
    assert half == Needs(12, WEIGHTS, 3 * 4 * EXPERT, PAGE)
    assert full.memory(LOAD) == WEIGHTS + 24 * EXPERT + 5 * PAGE == 308_352
    assert full.memory(LOAD._replace(output_tokens=1)) == 308_352 + 2 * PAGE


def test_half_precision_takes_half():
    full, half = (Needs.of(CONFIG, 0.5, dtype) for dtype in ("float32", "bfloat16"))
    assert half.memory(LOAD) * 2 == full.memory(LOAD)
    assert Needs.of(CONFIG.replace(dtype="bfloat16"), 0.5, "auto") == half


@pytest.mark.parametrize(
    ("geometry", "name", "expert"),
    [
        ("gpt-oss-20b", "auto", 3 * 2880 * 2880 // 2 + 3 * 2880 * 90 + 4 * 3 * 2880),
        ("qwen3-30b-a3b", "fp8", 3 * 768 * 2048 + 4 * 3 * 6 * 16),
        ("qwen3-30b-a3b", "int8", 3 * 768 * 2048 + 4 * (2 * 768 + 2048)),
    ],
)
def test_experts_in_published_formats_by_hand(geometry: str, name: str, expert: int):
    config = config_from_hf(GEOMETRIES[geometry])
    slots = len(config.moe_layers) * config.num_experts
    assert Needs.of(config, 1.0, "auto", name).slab == slots * expert


def test_room_by_hand():
    numbers = measure(CONFIG, "float32", DEVICE, [1.0, 0.5, 0.1], LOAD, [16, 64], [1, 3])
    full, half = numbers["1"], numbers["0.5"]
    assert half["memory_saved"] == pytest.approx(12 * EXPERT / 308_352)
    assert half["expert_memory_saved"] == 0.5
    assert full["by_prompt_length"] == {"16": 308_352 - 2 * PAGE, "64": 308_352 + 4 * PAGE}
    assert full["by_batch"] == {"1": 308_352 - 2 * PAGE, "3": 308_352 + 2 * PAGE}
    # A tenth of the device is workspace. (450,000 - 277,632) / 6,144 is 28.1 and (450,000 - 167,040) / 6,144 is 46.1
    # pages; one of them is for padding.
    assert full["same_device"] == {
        "longest_prompt": 13 * 16,
        "longest_prompt_within_model": 96,
        "prompt_ratio": 1,
        "largest_batch": 13,
        "batch_ratio": 1,
    }
    assert half["same_device"] == {
        "longest_prompt": 22 * 16,
        "longest_prompt_within_model": 96,
        "prompt_ratio": pytest.approx(22 / 13),
        "largest_batch": 22,
        "batch_ratio": pytest.approx(22 / 13),
    }
    # Twelve experts less are 18 pages: 4 + 18 pages are 11 for each of two prompts, or 11 prompts of two.
    assert full["same_memory"]["prompt_ratio"] == full["same_memory"]["batch_ratio"] == 1
    assert half["same_memory"]["longest_prompt"] == 11 * 16
    assert half["same_memory"]["prompt_ratio"] == half["same_memory"]["batch_ratio"] == 5.5
    assert full["fits"]
    assert half["fits"]
    assert "the smallest budget is 25%" in numbers["0.1"]["problem"]


def test_output_tokens_take_room_from_prompts():
    numbers = measure(CONFIG, "float32", DEVICE, [1.0], LOAD._replace(output_tokens=40), [16], [1])["1"]
    assert numbers["same_device"]["longest_prompt"] == 13 * 16 - 40
    assert numbers["same_device"]["longest_prompt_within_model"] == 96 - 40
    assert numbers["same_device"]["largest_batch"] == 27 // 5  # 72 tokens are five pages


def test_where_all_experts_have_no_room_there_is_no_ratio():
    device = int((WEIGHTS + 12 * EXPERT + 6 * PAGE) / 0.9) + 1
    numbers = measure(CONFIG, "float32", device, [1.0, 0.5], LOAD, [16], [1])
    assert not numbers["1"]["fits"]
    assert numbers["1"]["same_device"]["longest_prompt"] == 0
    assert numbers["0.5"]["fits"]
    assert numbers["0.5"]["same_device"]["largest_batch"] == 2
    assert numbers["0.5"]["same_device"]["prompt_ratio"] is None


@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize(("prompt", "batch"), [(16, 1), (33, 3), (96, 4)])
def test_the_engines_plan_is_of_the_same_size(share: float, prompt: int, batch: int):
    needs, load = Needs.of(CONFIG, share, "float32"), Workload(prompt, batch, 0)

    def plan(device_bytes: int) -> MemoryPlan:
        return MemoryPlan.of(
            CONFIG,
            platform="cpu",
            device_bytes=device_bytes,
            expert_memory=f"{100 * share:g}%",
            max_model_len=prompt,
            max_num_seqs=batch,
        )

    report = plan(10**9).report()
    assert report["weights"] + report["slab"] + report["kv_cache"] == needs.memory(load)
    # The smallest device that has room for all of it.
    device = next(
        d
        for d in range(int(needs.memory(load) / 0.9) - 4, 10**9)
        if pages_on(CONFIG, share, "float32", d) >= load.pages
    )
    assert plan(device).num_pages == load.pages + 1
    try:
        assert plan(device - 2).num_pages < load.pages + 1
    except CapacityError:
        assert batch == 1


def test_a_directory_and_its_config_are_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "tiny").mkdir()
    path = tmp_path / "tiny" / "config.json"
    path.write_text(json.dumps(TINY | {"torch_dtype": "bfloat16"}))
    assert read_config(path) == read_config(path.parent)
    results: list[dict[str, Any]] = []
    for given in (path, path.parent):
        out = tmp_path / "out.json"
        options = ["--device-memory", "1MB", "--shares", "1", "0.5", "0.2", "--prompt-length", "32", "--batch", "2"]
        assert main(["--model", str(given), *options, "--json", str(out), "--plots", str(tmp_path)]) == 0
        results.append(json.loads(out.read_text()))
    assert results[0]["resident"] == results[1]["resident"]
    assert results[0]["model"]["dtype"] == "bfloat16"
    assert results[0]["resident"]["1"]["memory"] == 308_352 // 2
    assert results[0]["resident"]["1"]["slots"] == TINY["num_local_experts"] * TINY["num_hidden_layers"]
    assert results[0]["load"] == {"prompt_length": 32, "batch": 2, "output_tokens": 0}
    assert (tmp_path / "memory.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "5.50x" in printed
    assert "20%: expert memory of 20% gives 1 or 2 expert slots" in printed


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "cut.json").write_text("{")
    for options, message in (
        (["--model", str(tmp_path)], "config.json is missing"),
        (["--model", str(tmp_path / "none.json")], "No such file"),
        (["--model", str(tmp_path / "list.json")], "holds a list"),
        (["--model", str(tmp_path / "cut.json")], "is not valid JSON"),
        (["--geometry", "olmoe-1b-7b", "--device-memory", "much"], "--device-memory 'much' is not an amount of bytes"),
    ):
        assert main(options) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    for options in (["--shares", "2"], ["--batch", "0"], ["--batches", "1", "0"], ["--output-tokens", "-1"]):
        with pytest.raises(SystemExit):
            main(["--geometry", "olmoe-1b-7b", *options])
    with pytest.raises(SystemExit):
        main([])


def test_what_a_step_takes_grows_with_tokens_and_layers_and_not_with_what_is_resident():
    def config(layers: int) -> ModelConfig:
        return CONFIG.replace(num_layers=layers, moe_layers=tuple(range(layers)), sliding_windows=(), max_position=256)

    three = step_bytes(config(3), 1.0, 4, 64)
    assert step_bytes(config(3), 0.5, 4, 64) == pytest.approx(three, rel=0.02)
    assert step_bytes(config(3), 1.0, 4, 256) > 1.5 * three
    two, four = step_bytes(config(2), 1.0, 4, 64), step_bytes(config(4), 1.0, 4, 64)
    assert four - three == pytest.approx(three - two, abs=8)
