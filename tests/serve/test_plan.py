"""`emoe plan`: what it prints, what it refuses, and how it ends. Steps are not compiled here, but taken as given."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import planning
from emoe_jax.option_fields import options_of
from emoe_jax.planning import fit
from emoe_jax.planning.catalogue import known_models
from emoe_jax.planning.plan import LARGER
from emoe_jax.planning.targets import CARDS, Target
from serve import emoe, planned
from serve import plan as command
from tests.engines import TINY

STEP_BYTES = 4 << 30
"""More than twice what steps of Mixtral-8x7B take, compiled."""

ROOT = Path(__file__).parents[2]

Run = Callable[..., tuple[int, Any]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`run("mixtral-8x7b", "--device", ...)`: the exit status and the JSON."""
    monkeypatch.setattr(fit, "step_bytes", lambda *arguments: STEP_BYTES)

    def call(*arguments: str) -> tuple[int, Any]:
        status = emoe.main(["plan", *arguments, "--json"])
        return status, json.loads(capsys.readouterr().out)

    return call


def test_mixtral_with_most_of_its_experts_has_a_long_context_on_one_card(run: Run) -> None:
    status, plan = run("mixtral-8x7b", "--device", "h100-80gb", "--expert-memory", "60%")
    assert status == 0
    assert plan["fits"]
    assert plan["max_context"] == 32768
    assert plan["max_batch"] >= 1
    memory = plan["memory_bytes"]
    assert set(memory) == {"weights", "slab", "kv", "workspace", "total"}
    assert memory["total"] == sum(memory[part] for part in ("weights", "slab", "kv", "workspace"))
    assert memory["total"] <= plan["device_bytes"] == int(0.9 * 81_559 * 2**20)
    assert memory["slab"] == 153 * 2 * 3 * 4096 * 14336
    assert plan["smallest_device"] == "a100-80gb"
    assert 0 < plan["tpot_resident_ms"] < plan["tpot_ms"]
    assert plan["ttft_ms"] > plan["tpot_ms"]


@pytest.mark.parametrize("model", ["gpt-oss-120b", "qwen3-30b-a3b", "openmoe-8b", "glm-4.5-air"])
def test_todays_models_plan(run: Run, model: str) -> None:
    status, plan = run(model, "--device", "h200", "--expert-memory", "50%")
    assert (status, plan["fits"], plan["meets_slo"]) == (0, True, None)


def test_what_does_not_fit_ends_with_1_and_says_what_would(run: Run) -> None:
    status, plan = run("mixtral-8x7b", "--device", "rtx4090", "--expert-memory", "60%", "--context", "8192")
    assert (status, plan["fits"], plan["max_batch"]) == (1, False, 0)
    assert "expert memory of 60% is" in plan["problem"]
    assert plan["memory_bytes"]["total"] > plan["device_bytes"]
    assert any("--expert-format int8" in line for line in plan["advice"])
    assert plan["smallest_device"] == "a100-80gb"
    assert {plan[name] for name in ("ttft_ms", "tpot_ms", "tpot_resident_ms", "bound")} == {None}


def test_advice_that_would_not_do_is_not_named(run: Run) -> None:
    """On this card all experts in int8 do not fit either: a share of them does."""
    _, plan = run("mixtral-8x7b", "--device", "rtx4090", "--expert-memory", "100%", "--context", "8192")
    assert [line.partition(" fits")[0].rpartition(" ")[2] for line in plan["advice"]] == ["int8"]
    assert plan["advice"][0].startswith("--expert-memory ")


def test_where_one_change_does_not_do_two_are_named(run: Run) -> None:
    asked = ("mixtral-8x7b", "--device", "rtx4090", "--expert-memory", "60%", "--context", "8192", "--batch", "64")
    _, plan = run(*asked)
    line = plan["advice"][0]
    changes = line.partition(" fits")[0].split()
    assert changes[:3] == ["--batch", "1", "--expert-memory"]
    assert run("mixtral-8x7b", "--device", "rtx4090", "--context", "8192", *changes)[0] == 0
    assert run("deepseek-v3", "--device", "l4")[1]["advice"] == [LARGER]


def test_objectives_choose_the_card_and_the_status(run: Run) -> None:
    asked = ("qwen3-30b-a3b", "--context", "2048", "--batch", "8", "--expert-memory", "100%")
    _, easy = run(*asked, "--device", "h200", "--slo-tpot-ms", "1000")
    status, hard = run(*asked, "--device", "h200", "--slo-tpot-ms", "10")
    assert (easy["meets_slo"], hard["meets_slo"], status) == (True, True, 0)
    assert (easy["smallest_device"], hard["smallest_device"]) == ("a100-80gb", "h200")
    status, missed = run(*asked, "--device", "h200", "--slo-ttft-ms", "0.01")
    assert (missed["fits"], missed["meets_slo"], status, missed["smallest_device"]) == (True, False, 1, None)


def test_the_smallest_card_holds_as_long_sequences(run: Run) -> None:
    asked = ("gpt-oss-20b", "--expert-memory", "100%")
    _, plan = run(*asked, "--device", "h200")
    _, short = run(*asked, "--device", "h200", "--context", "4096")
    assert (plan["context"], plan["smallest_device"], short["smallest_device"]) == (131_072, "rtx5090", "l4")
    assert run(*asked, "--device", "l4", "--context", "131072")[0] == 1


def test_the_table_says_which_objective_is_missed(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["olmoe-1b-7b", "--device", "h200", "--slo-tpot-ms", "1000"]
    assert emoe.main(["plan", *asked, "--slo-ttft-ms", "0.01"]) == 1
    assert "missed: first token in 0.01 ms" in capsys.readouterr().out


def test_coverage_that_would_meet_an_objective_is_named(run: Run) -> None:
    asked = ("mixtral-8x7b", "--device", "h100-80gb", "--expert-memory", "60%", "--slo-tpot-ms", "50")
    status, plan = run(*asked)
    assert (status, plan["meets_slo"]) == (1, False)
    [line] = plan["advice"]
    coverage = float(line.split()[3])
    assert line.startswith("a coverage of 0.")
    assert run(*asked, "--coverage", f"{coverage + 0.001}")[0] == 0
    assert run(*asked, "--coverage", f"{coverage - 0.01}")[0] == 1


def test_a_device_of_ones_own(run: Run) -> None:
    own = ("--device-memory", "24GiB", "--hbm-gbps", "1000", "--link-gbps", "25")
    _, plan = run("olmoe-1b-7b", *own)
    assert (plan["device"], plan["device_bytes"]) == ("a device of your own", 24 << 30)
    _, slower = run("olmoe-1b-7b", *own, "--tflops", "0.1")
    assert slower["ttft_ms"] > plan["ttft_ms"]
    _, card = run("olmoe-1b-7b", "--device", "rtx4090", "--device-memory", "20GiB", "--hbm-gbps", "1")
    assert (card["device"], card["device_bytes"]) == ("rtx4090", 20 << 30)
    assert card["tpot_ms"] > 100 * plan["tpot_ms"]


def test_the_prompt_is_the_context_unless_it_is_given(run: Run) -> None:
    asked = ("olmoe-1b-7b", "--device", "l40s")
    assert run(*asked)[1]["prompt"] == 1024
    assert run(*asked, "--context", "64")[1]["prompt"] == 64
    assert run(*asked, "--context", "64", "--prompt", "32")[1]["prompt"] == 32


def test_the_table_has_the_same_numbers(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["mixtral-8x7b", "--device", "a100-40gb", "--expert-memory", "25%", "--context", "4096", "--batch", "64"]
    status, plan = run(*asked)
    monkeypatch.setenv("COLUMNS", "160")
    assert emoe.main(["plan", *asked]) == status == 1
    printed = capsys.readouterr().out
    assert "mixtral-8x7b on a100-40gb" in printed
    assert f"no: {plan['problem']}"[:100] in printed
    assert f"{plan['max_context']:,} tokens, 64 sequences at once" in printed
    assert all(f"- {line}\n" in printed for line in plan["advice"])
    assert plan["advice"]
    assert "what does not fit takes no steps" in printed
    assert not re.search(r"\d ms|first token|each token", printed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["README.md"], "README.md is a file; expected a directory with a config.json, or a config.json"),
        (["mixtral"], "'mixtral' is neither a directory, a config.json, a hub id (owner/name) nor a known model"),
        (["olmoe-1b-7b", "--device", "h100"], "the nearest known one is 'h100-80gb'"),
        (["olmoe-1b-7b", "--device", "l4", "--context", "5000"], "--context is 5000; the model allows 2 to 4096"),
        (["olmoe-1b-7b", "--device", "l4", "--batch", "0"], "--batch is '0'; expected an integer between 1 and 4096"),
        (["olmoe-1b-7b", "--device", "l4", "--expert-memory", "x"], "--expert-memory"),
        (["olmoe-1b-7b", "--device", "l4", "--coverage", "2"], "--coverage"),
        (["olmoe-1b-7b", "--device-memory", "much"], "--device-memory"),
        (["olmoe-1b-7b", "--hbm-gbps", "9"], "--hbm-gbps describes a device of your own; give --device-memory and"),
        (["olmoe-1b-7b", "--device", "l4", "--prompt", "5000"], "the prompt has 5000 tokens; expected at most 4096"),
        (["olmoe-1b-7b", "--device", "l4", "--device-memory", "40GiB"], "--device-memory is 40 GiB; expected at most"),
        (["olmoe-1b-7b", "--devise", "l4"], "the nearest known one is '--device'"),
        (["olmoe-1b-7b", "l4"], "unknown option 'l4'"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = emoe.main(["plan", *arguments])
    except SystemExit as ended:
        status = ended.code
    out, err = capsys.readouterr()
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert err.startswith("error: ")


def test_this_machine_is_planned_where_no_device_is_named(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    asked = []

    def here(memory_bytes: int) -> Target:
        asked.append(memory_bytes)
        return Target("here", "cpu", memory_bytes, 1e9, 1e9, 1e9, 1e9)

    monkeypatch.setattr(planned, "this_machine", here)
    _, plan = run(str(tmp_path), "--device-memory", "100MB")
    assert asked == [10**8]
    assert (plan["device"], plan["dtype"], plan["resident_share"]) == ("here", "float32", 1.0)
    assert plan["memory_bytes"]["workspace"] == 10**7  # fits with much to spare: as an engine plans before its warm-up


def test_help_says_how_it_was_called_and_what_the_status_means(capsys: pytest.CaptureFixture[str]) -> None:
    for main, name in ((emoe.main, "emoe plan"), (lambda words: command.main(words[1:]), "python -m serve.plan")):
        with pytest.raises(SystemExit) as ended:
            main(["plan", "--help"])
        assert ended.value.code == 0
        assert capsys.readouterr().out.startswith(f"usage: {name} [-h]")


def test_check_prints_what_was_predicted_and_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = dict.fromkeys(planning.LABELS, 0.25)
    row = {"model": "demo", "what": "decode", "predicted_ms": 2.0, "measured_ms": 4.0, "ratio": 0.5, "parts_ms": parts}
    numbers = {"costs": dict.fromkeys(planning.LABELS, 1e-9), "rows": [row]}
    monkeypatch.setattr(planning, "check", lambda repetitions: numbers)
    assert emoe.main(["plan", "--check", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == numbers
    assert emoe.main(["plan", "--check"]) == 0
    assert "0.50" in capsys.readouterr().out


def test_the_readme_shows_what_the_command_prints(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With what its steps took when they were compiled."""
    text = (ROOT / "README.md").read_text()
    [line] = re.findall(r"^\.venv/bin/emoe (plan .*)$", text, re.MULTILINE)
    monkeypatch.setattr(fit, "step_bytes", lambda *arguments: 1_495_415_240)
    monkeypatch.setenv("COLUMNS", "100")
    assert emoe.main(line.split()) == 0
    printed = "\n".join(row.rstrip() for row in capsys.readouterr().out.splitlines())
    assert f"```\n{printed}\n```" in text


def test_the_page_names_every_flag_model_and_card() -> None:
    page = (ROOT / "docs" / "how-to" / "plan.md").read_text()
    flags = {one.flag for one in options_of(command.PlanOptions)}
    assert not [name for name in (*flags, *CARDS, *known_models()) if f"`{name}" not in page and name not in page]
