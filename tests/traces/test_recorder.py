"""Recording: what is added comes out as one sorted trace, whatever happens to the process in between."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from emoe_jax.errors import ConfigError
from emoe_jax.traces import RoutingTrace
from emoe_jax.traces import assemble as assembling
from emoe_jax.traces import recorder as recording
from emoe_jax.traces.parts import MAX_TASKS, parts_of
from emoe_jax.traces.recorder import TraceRecorder, recover

L, E, K, D = 3, 8, 2, 4


def rows(n: int, seed: int = 0, num_experts: int = E) -> tuple[np.ndarray, np.ndarray]:
    """Random choices of `n` tokens: different experts, most probable first."""
    rng = np.random.default_rng(seed)
    experts = rng.permuted(np.broadcast_to(np.arange(num_experts), (n, L, num_experts)), axis=-1)[..., :K]
    return experts, -np.sort(-rng.random((n, L, K)))


def load(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as archive:
        return dict(archive)


def test_tokens_come_out_sorted_by_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve prompts computed side by side, more rows than fit a block."""
    monkeypatch.setattr(assembling, "BLOCK", 7)
    path = tmp_path / "trace.npz"
    embeddings = np.random.default_rng(1).random((12, D))
    expected: dict[int, list] = {sample: [] for sample in range(12)}
    with TraceRecorder(path, L, E, K, embedding_size=D) as recorder:
        samples = [recorder.begin(("qa", None, " ")[n % 3], 5 + n, embeddings[n]) for n in range(12)]
        assert samples == list(range(12))
        for step in range(9):
            active = [sample for sample in samples if (sample + step) % 4 and sample != 7]
            experts, probs = rows(len(active), step)
            recorder.add(active, [len(expected[sample]) for sample in active], experts, probs)
            for sample, chosen, weights in zip(active, experts, probs, strict=True):
                expected[sample].append((chosen, weights))
    assert list(tmp_path.iterdir()) == [path]
    arrays = load(path)
    assert {name: array.dtype.str for name, array in arrays.items() if name != "task_names"} == {
        "experts": "|u1",
        "probs": "<f2",
        "sample": "<i4",
        "token_pos": "<i4",
        "task": "<i2",
        "prompt_length": "<i4",
        "prompt_embedding": "<f2",
        "num_experts": "<i4",
        "top_k": "<i4",
    }
    kept = [sample for sample in samples if sample != 7]  # nothing was computed of it
    assert arrays["sample"].tolist() == [n for n, sample in enumerate(kept) for _ in expected[sample]]
    assert arrays["token_pos"].tolist() == [n for sample in kept for n in range(len(expected[sample]))]
    np.testing.assert_array_equal(arrays["experts"], [c for sample in kept for c, _ in expected[sample]])
    np.testing.assert_allclose(arrays["probs"], [p for sample in kept for _, p in expected[sample]], atol=1e-3)
    assert [arrays["task_names"][task] for task in arrays["task"]] == [("qa", "other", "other")[n % 3] for n in kept]
    assert arrays["prompt_length"].tolist() == [5 + n for n in kept]
    np.testing.assert_allclose(arrays["prompt_embedding"], embeddings[kept], atol=1e-3)
    RoutingTrace.load(path)


def test_many_experts_take_two_bytes(tmp_path: Path) -> None:
    with TraceRecorder(tmp_path / "trace.npz", L, 300, K) as recorder:
        experts, probs = rows(2, num_experts=300)
        recorder.add([recorder.begin(None, 1)] * 2, [0, 1], experts, probs)
    arrays = load(tmp_path / "trace.npz")
    assert arrays["experts"].dtype == np.uint16
    np.testing.assert_array_equal(arrays["experts"], experts)
    assert "prompt_embedding" not in arrays


KILLED = """
import sys, time
import numpy as np
from emoe_jax.traces.recorder import TraceRecorder
recorder = TraceRecorder(sys.argv[1], 3, 8, 2)
sample = recorder.begin("qa", 5)
for n in range(10**9):
    experts = np.broadcast_to(np.array([n % 8, (n + 1) % 8]), (1, 3, 2))
    recorder.add([sample], [n], experts, np.full((1, 3, 2), 0.5))
    if n == 300:
        print("ready", flush=True)
    time.sleep(0.001)
"""


def test_a_killed_process_leaves_a_whole_trace(tmp_path: Path) -> None:
    path = tmp_path / "trace.npz"
    with subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        with pytest.raises(ConfigError, match="is being recorded by another process"):
            TraceRecorder(path, L, E, K)
        deadline = time.monotonic() + 30
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    snapshot = RoutingTrace.load(path).num_tokens
    assert snapshot > 0

    with (parts_of(path) / "rows.bin").open("ab") as file:
        file.write(b"half a record")
    with TraceRecorder(path, L, E, K) as recorder:  # goes on after what was left
        sample = recorder.begin("sum", 2)
        assert sample == 1
        recorder.add([sample], [0], *rows(1))
    trace = RoutingTrace.load(path)
    assert trace.num_tokens > snapshot
    assert trace.tasks == ["qa", "sum"]
    assert trace.token_pos.tolist() == [*range(trace.num_tokens - 1), 0]
    assert trace.experts[5, 0].tolist() == [5, 6]
    assert os.listdir(tmp_path) == ["trace.npz"]


def leave_parts(path: Path, tokens: int) -> None:
    """What a process leaves that is killed before its first snapshot."""
    recorder = TraceRecorder(path, L, E, K)
    recorder.add([recorder.begin("qa", 3)] * tokens, range(tokens), *rows(tokens))
    recorder.close()
    with np.load(path) as archive:
        experts, probs = archive["experts"], archive["probs"]
    path.unlink()
    parts = recording.TraceParts(path, recording.Geometry(L, E, K))
    prompt = np.zeros(1, parts.geometry.prompt)
    prompt["task"] = parts.task_index("qa")
    records = np.zeros(tokens, parts.geometry.row)
    records["token_pos"], records["experts"], records["probs"] = range(tokens), experts, probs
    parts.append([prompt], [records])
    parts.close()


def test_what_was_left_can_be_finished(tmp_path: Path) -> None:
    path = tmp_path / "trace.npz"
    leave_parts(path, 6)
    assert recover(path) == 6
    assert RoutingTrace.load(path).num_tokens == 6
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ConfigError, match="there is no recording to recover"):
        recover(path)


def test_parts_of_another_model_or_damaged_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "trace.npz"
    leave_parts(path, 2)
    with pytest.raises(ConfigError, match="holds a recording of another model"):
        TraceRecorder(path, L + 1, E, K)
    (parts_of(path) / "header.json").write_text("{")
    with pytest.raises(ConfigError, match="is not the header of a recording"):
        TraceRecorder(path, L, E, K)


def test_paths_that_cannot_be_recorded_to(tmp_path: Path) -> None:
    (tmp_path / "there.npz").touch()
    for name, match in (
        ("there.npz", "exists; choose another file"),
        ("trace.bin", r"must be named \*.npz"),
        ("missing/trace.npz", "No such file or directory"),
    ):
        with pytest.raises(ConfigError, match=match):
            TraceRecorder(tmp_path / name, L, E, K)


def test_a_failing_disk_ends_the_recording_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(recording, "MAX_PENDING_BYTES", 100)
    recorder = TraceRecorder(tmp_path / "trace.npz", L, E, K)
    monkeypatch.setattr(recorder._parts, "append", fail)
    sample = recorder.begin("qa", 3)
    for n in range(50):  # beyond what may be pending: it must not wait forever
        recorder.add([sample], [n], *rows(1))
    with pytest.raises(ConfigError, match="could not be written: No space left on device"):
        recorder.close()
    assert "No space left" in caplog.text


def test_task_names_are_bounded(tmp_path: Path) -> None:
    with TraceRecorder(tmp_path / "trace.npz", L, E, K) as recorder:
        for n in range(MAX_TASKS + 5):
            recorder.add([recorder.begin(f"task {n}", 1)], [0], *rows(1))
    trace = RoutingTrace.load(tmp_path / "trace.npz")
    assert len(trace.task_names) == MAX_TASKS + 1
    assert trace.tasks[-6:] == [f"task {MAX_TASKS - 1}", *["other"] * 5]


def test_memory_is_bounded_and_nothing_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "MAX_PENDING_BYTES", 3000)
    monkeypatch.setattr(recording, "FLUSH_BYTES", 1000)
    with TraceRecorder(tmp_path / "trace.npz", L, E, K) as recorder:
        sample = recorder.begin("qa", 3)
        for n in range(0, 2000, 4):
            recorder.add([sample] * 4, range(n, n + 4), *rows(4, n))
            assert recorder._pending < 3000 + 1000
    assert RoutingTrace.load(tmp_path / "trace.npz").token_pos.tolist() == list(range(2000))


def test_ranks_behind_the_chosen_ones_have_arrays_of_their_own(tmp_path: Path) -> None:
    """So a reader that knows nothing of them reads the choices, and a trace of other ranks is not gone on with."""
    path = tmp_path / "trace.npz"
    ranked = np.broadcast_to(np.arange(5), (4, L, 5))
    probs = np.broadcast_to(np.linspace(0.5, 0.1, 5), ranked.shape)
    with TraceRecorder(path, L, E, K, ranks=5) as recorder:
        recorder.add([recorder.begin("qa", 4)] * 4, range(4), ranked, probs)
    arrays = load(path)
    assert arrays["experts"].shape == (4, L, K)
    assert arrays["further_experts"].tolist() == ranked[..., K:].tolist()
    np.testing.assert_allclose(arrays["further_probs"], probs[..., K:], atol=1e-3)
    trace = RoutingTrace.load(path)
    assert (trace.top_k, trace.ranks) == (K, 5)
    assert trace.select([0]).ranks == 5
    other = recording.TraceParts(tmp_path / "other.npz", recording.Geometry(L, E, K, further=3))
    other.close()
    with pytest.raises(ConfigError, match=r"holds a recording of 5 ranks; this one has 2 \(trace_ranks\)"):
        TraceRecorder(tmp_path / "other.npz", L, E, K)
