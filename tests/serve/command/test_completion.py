"""Shell completion and the reference page: both are made from the parsers of all commands."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from serve import emoe
from serve.command import completion
from serve.command_reference import COMMAND, NOTES, page
from serve.commands import Command, leaves
from serve.exits import MEANINGS

PAGE = Path(__file__).parents[3] / "docs" / "reference" / "command.md"


@pytest.fixture(scope="module")
def bash() -> str:
    return completion.script("bash")


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["emoe", ""], ["serve", "chat", "bench", "traces", "predictor", "completion"]),
        (["emoe", "bench", ""], ["latency", "throughput", "serve", "kernels"]),
        (["emoe", "bench", "serve", "--slo"], ["--slo-ttft-ms", "--slo-tpot-ms"]),
        (["emoe", "bench", "serve", "--arrivals", ""], ["poisson", "gamma", "constant", "closed"]),
        (["emoe", "serve", "--routing", "b"], ["bounded"]),
        (["emoe", "traces", "record", "--prom"], ["--prompts"]),
    ],
    ids=" ".join,
)
def test_bash_offers_commands_flags_and_words(words: list[str], offered: list[str], bash: str, tmp_path: Path) -> None:
    if shutil.which("bash") is None:
        pytest.skip("there is no bash")
    (tmp_path / "script").write_text(bash)
    quoted = " ".join(f'"{word}"' for word in words)
    code = f'source ./script; COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; _shtab_emoe; echo "${{COMPREPLY[@]}}"'
    ran = subprocess.run(["bash", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True)
    assert set(offered) <= set(ran.stdout.split())


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts_are_ones_that_the_shells_read(shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert emoe.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "emoe" in script
    if shutil.which(shell) is not None:
        (tmp_path / "script").write_text(script)
        subprocess.run([shell, "-n", "./script"], cwd=tmp_path, check=True, timeout=60)


def test_an_unknown_shell_and_a_missing_package_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        emoe.main(["completion", "tcsh"])
    assert ended.value.code == 2
    assert "choose from" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert emoe.main(["completion", "bash"]) == 2
    assert capsys.readouterr().err == "error: the package shtab is missing: pip install 'emoe-jax[completion]'\n"


def test_the_reference_page_is_what_the_parsers_say() -> None:
    assert PAGE.read_text() == page(), f"make it anew: {COMMAND}"


def test_the_page_has_every_command_and_status() -> None:
    text, called = page(), dict(leaves())
    assert all(f"\n## {name}\n" in text for name in called)
    assert all(f"\n| {status} | {meaning} |\n" in text for status, meaning in MEANINGS.items())
    assert set(NOTES) <= set(called)


@pytest.mark.parametrize(("called", "command"), [*leaves()], ids=[called for called, _ in leaves()])
def test_every_command_that_reports_has_json(called: str, command: Command) -> None:
    flags = {flag for action in command.load().parser(called)._actions for flag in action.option_strings}
    assert ("--json" in flags) == (called not in ("emoe serve", "emoe completion"))
