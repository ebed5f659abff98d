"""Token ids of prompts: recorded where that is asked for, kept with their prompts, and checked when a trace is read."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from emoe_jax.errors import ConfigError
from emoe_jax.traces import RoutingTrace, TraceError
from emoe_jax.traces import assemble as assembling
from emoe_jax.traces.parts import Geometry, TraceParts
from emoe_jax.traces.recorder import TraceRecorder
from tests.traces.synthetic import make_trace

L, E, K = 3, 8, 2


def computed(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Choices of `n` tokens."""
    return np.broadcast_to(np.arange(K), (n, L, K)), np.full((n, L, K), 0.5)


def test_each_prompt_comes_out_with_its_own_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Computed side by side, more than fit a block; of one nothing was computed, and one is empty."""
    monkeypatch.setattr(assembling, "BLOCK", 3)
    path = tmp_path / "trace.npz"
    prompts = [list(range(10 * n, 10 * n + n % 5)) for n in range(11)]
    with TraceRecorder(path, L, E, K, tokens=True) as recorder:
        samples = [recorder.begin("qa", len(ids), token_ids=ids) for ids in prompts]
        for _ in range(2):
            recorder.add([sample for sample in samples if sample != 4], [0] * 10, *computed(10))
        with pytest.raises(ValueError, match="a prompt of 3 tokens came with 2 token ids"):
            recorder.begin("qa", 3, token_ids=[1, 2])
    trace = RoutingTrace.load(path)
    kept = [ids for n, ids in enumerate(prompts) if n != 4]
    assert [ids.tolist() for ids in trace.tokens_by_prompt()] == kept
    assert [ids.tolist() for ids in trace.select([8, 0, 3]).tokens_by_prompt()] == [kept[8], kept[0], kept[3]]
    trace.select([2, 1]).save(tmp_path / "some.npz")
    assert [ids.tolist() for ids in RoutingTrace.load(tmp_path / "some.npz").tokens_by_prompt()] == [kept[2], kept[1]]


def test_tokens_are_not_recorded_unasked(tmp_path: Path) -> None:
    with TraceRecorder(tmp_path / "trace.npz", L, E, K) as recorder:
        recorder.add([recorder.begin("qa", 2, token_ids=[5, 6])], [0], *computed(1))
    trace = RoutingTrace.load(tmp_path / "trace.npz")
    assert trace.prompt_tokens is None
    with pytest.raises(TraceError, match="does not hold the tokens of its prompts"):
        trace.tokens_by_prompt()


@pytest.mark.parametrize(
    ("tokens", "prompts", "left"), [(5, 3, 2), (6, 2, 2), (6, 3, 3), (7, 3, 3), (2, 3, 1), (1, 3, 0)]
)
def test_what_a_killed_process_leaves_is_cut_to_whole_prompts(
    tmp_path: Path, tokens: int, prompts: int, left: int
) -> None:
    """Three prompts of two tokens each, and half a token more, as far as they were written."""
    path, geometry = tmp_path / "trace.npz", Geometry(L, E, K, tokens=True)
    parts = TraceParts(path, geometry)
    records = np.zeros(3, geometry.prompt)
    records["length"] = 2
    parts.task_index("qa")
    parts.append([records], [], [np.arange(7, dtype="<i4")])
    parts.close()
    with (parts.directory / "tokens.bin").open("r+b") as file:
        file.truncate(4 * tokens + 2 * (tokens < 7))
    with (parts.directory / "prompts.bin").open("r+b") as file:
        file.truncate(prompts * geometry.prompt.itemsize + 1 * (prompts < 3))
    with TraceRecorder(path, L, E, K, tokens=True) as recorder:
        assert recorder.begin("sum", 3, token_ids=[70, 71, 72]) == left
        recorder.add([*range(left), left], [0] * (left + 1), *computed(left + 1))
    found = [ids.tolist() for ids in RoutingTrace.load(path).tokens_by_prompt()]
    assert found == [*[[0, 1], [2, 3], [4, 5]][:left], [70, 71, 72]]


def test_a_recording_without_tokens_does_not_go_on_with_them(tmp_path: Path) -> None:
    path = tmp_path / "trace.npz"
    TraceParts(path, Geometry(L, E, K)).close()
    with pytest.raises(ConfigError, match="holds a recording without the tokens of its prompts; this one is with them"):
        TraceRecorder(path, L, E, K, tokens=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_tokens": np.arange(5, dtype=np.int32)}, "prompt_tokens has 5 tokens; prompt_length adds up to 8"),
        ({"prompt_tokens": -np.arange(8, dtype=np.int32)}, "prompt_tokens is -7 somewhere; token ids start at 0"),
        ({"prompt_length": None}, "prompt_tokens has 8 tokens; prompt_length is missing"),
        ({"prompt_tokens": np.arange(8.0)}, "prompt_tokens has dtype float64"),
    ],
)
def test_tokens_that_do_not_fit_are_one_clear_line(tmp_path: Path, change: dict, message: str) -> None:
    trace = make_trace(prompts=4)
    whole = dataclasses.replace(
        trace, prompt_length=np.full(4, 2, np.int32), prompt_tokens=np.arange(8, dtype=np.int32)
    )
    whole.validate()
    dataclasses.replace(whole, **change).save(tmp_path / "trace.npz")
    with pytest.raises(TraceError, match=message) as caught:
        RoutingTrace.load(tmp_path / "trace.npz")
    assert "\n" not in str(caught.value)
