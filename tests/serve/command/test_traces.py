"""`emoe traces`: what a trace holds, whether it is one, and parts of it."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

from emoe_jax.traces import RoutingTrace
from emoe_jax.traces.recorder import TraceRecorder
from serve import emoe
from tests.engines import TINY
from tests.traces.synthetic import make_trace


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("traces") / "trace.npz"
    make_trace(prompts=9).save(path)
    return path


def test_info_counts_prompts_and_tokens_by_task(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert emoe.main(["traces", "info", str(trace), "--json"]) == 0
    numbers, held = json.loads(capsys.readouterr().out), RoutingTrace.load(trace)
    assert (numbers["layers"], numbers["experts"], numbers["top_k"]) == (3, 8, 2)
    assert (numbers["prompts"], numbers["tokens"], numbers["holds"]) == (9, 360, ["prompt_embedding"])
    assert {task: row["prompts"] for task, row in numbers["tasks"].items()} == {
        task: held.tasks.count(task) for task in set(held.tasks)
    }
    assert sum(row["tokens"] for row in numbers["tasks"].values()) == 360
    best = np.sort(held.counts().sum(0), axis=-1)[:, -4:].sum() / (360 * 3 * 2)
    assert numbers["fixed_set"]["0.5"] == pytest.approx(best)


def test_info_prints_a_table(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert emoe.main(["traces", "info", str(trace)]) == 0
    out = capsys.readouterr().out
    assert "qa/short" in out
    assert "prompt embedding" in out


def test_check_says_of_each_file_what_it_is(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken, other, model = tmp_path / "broken.npz", tmp_path / "other.npz", tmp_path / "config.json"
    broken.write_bytes(trace.read_bytes()[:1000])
    make_trace(prompts=2, experts=16).save(other)
    model.write_text(json.dumps(TINY))
    assert emoe.main(["traces", "check", str(trace), "--model", str(model)]) == 0
    assert emoe.main(["traces", "check", str(trace), str(broken), str(other), "--model", str(model)]) == 1
    ok, *lines = capsys.readouterr().out.splitlines()
    assert ok == lines[0] == f"ok      {trace}: 3 MoE layers of 8 experts, top-2; 9 prompts, 360 tokens"
    assert [line.partition(" ")[0] for line in lines] == ["ok", "problem", "problem"]
    assert lines[1].endswith("is no .npz file, or the end of it is missing")
    assert "of 16 experts, top-2; the model has 3 MoE layers of 8 experts" in lines[2]
    assert emoe.main(["traces", "check", str(trace), str(broken), "--json"]) == 1
    assert [one["ok"] for one in json.loads(capsys.readouterr().out)["traces"]] == [True, False]


def test_a_converted_trace_holds_what_was_asked_for(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, part = tmp_path / "whole.npz", tmp_path / "part.npz"
    with zipfile.ZipFile(trace) as before:
        arrays = set(before.namelist())
    assert emoe.main(["traces", "convert", str(trace), str(whole)]) == 0
    with zipfile.ZipFile(whole) as after:
        assert set(after.namelist()) == arrays
    words = ["--skip", "2", "--prompts", "3", "--no-prompt-embedding", "--json"]
    capsys.readouterr()
    assert emoe.main(["traces", "convert", str(trace), str(part), *words]) == 0
    assert json.loads(capsys.readouterr().out)["prompts"] == 3
    held, first = RoutingTrace.load(part), RoutingTrace.load(trace)
    assert held.prompt_embedding is None
    assert held.tasks == first.tasks[2:5]
    np.testing.assert_array_equal(held.experts, first.experts[(first.sample >= 2) & (first.sample < 5)])


def test_what_clients_wrote_can_be_left_out(tmp_path: Path) -> None:
    source, out = tmp_path / "text.npz", tmp_path / "bare.npz"
    with TraceRecorder(source, 1, 4, 1, tokens=True) as recorder:
        sample = recorder.begin("qa", 2, token_ids=[7, 9])
        recorder.add([sample] * 2, [0, 1], np.zeros((2, 1, 1), np.uint8), np.ones((2, 1, 1), np.float16))
    assert RoutingTrace.load(source).prompt_tokens is not None
    assert emoe.main(["traces", "convert", str(source), str(out), "--no-prompt-tokens"]) == 0
    assert RoutingTrace.load(out).prompt_tokens is None


def test_further_ranks_are_told_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "ranks.npz", tmp_path / "out.npz"
    with TraceRecorder(source, 1, 4, 1, ranks=3) as recorder:
        ranked = np.broadcast_to(np.arange(3), (2, 1, 3))
        recorder.add([recorder.begin("qa", 2)] * 2, [0, 1], ranked, np.ones(ranked.shape))
    assert emoe.main(["traces", "convert", str(source), str(out)]) == 0
    assert emoe.main(["traces", "check", str(out)]) == 0
    assert emoe.main(["traces", "info", str(out)]) == 0
    assert "top-1, 3 ranks; 1 prompts" in (text := capsys.readouterr().out)
    assert "it holds 3 ranks" in text
    assert emoe.main(["traces", "info", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ranks"] == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["info", "missing.npz"], "missing.npz: no such trace file"),
        (["info"], "the following arguments are required: FILE"),
        (["convert", "{trace}", "{trace}"], "exists; choose another file or remove it"),
        (["convert", "{trace}", "out.txt"], "out.txt is no name for a trace; expected one that ends in .npz"),
        (["convert", "{trace}", "{folder}/o.npz", "--skip", "99"], "nothing is left of 9 prompts"),
        (["convert", "{trace}", "{folder}/o.npz", "--tasks", "tea"], "the trace has no task 'tea'; it has qa/short"),
        (["recover", "{folder}/none.npz"], "there is no recording to recover"),
        (["check", "{trace}", "--model", "mixtrl"], "the nearest known one is 'mixtral"),
    ],
)
def test_a_mistake_is_one_line(
    trace: Path, tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = emoe.main(["traces", *(word.format(trace=trace, folder=tmp_path) for word in arguments)])
    except SystemExit as ended:
        status = ended.code
    out, err = capsys.readouterr()
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert not (tmp_path / "o.npz").exists()


def test_a_killed_recording_is_recovered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cut.npz"
    recorder = TraceRecorder(path, 1, 4, 1)
    sample = recorder.begin("qa", 1)
    recorder.add([sample], [0], np.zeros((1, 1, 1), np.uint8), np.ones((1, 1, 1), np.float16))
    left, parts = tmp_path / "left.npz.parts", tmp_path / "cut.npz.parts"
    while not (parts / "rows.bin").exists() or not (parts / "rows.bin").stat().st_size:
        pass
    left.mkdir()
    for file in parts.iterdir():
        (left / file.name).write_bytes(file.read_bytes())
    recorder.close()
    assert emoe.main(["traces", "recover", str(tmp_path / "left.npz")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'left.npz'}: 1 tokens\n"
    assert RoutingTrace.load(tmp_path / "left.npz").num_prompts == 1
