"""The console script `emoe`, and what the package says of itself."""

import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

import emoe_jax
from serve import emoe
from serve import main as server
from serve.commands import COMMANDS, leaves

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_script_is_installed_under_its_name() -> None:
    module, _, function = PROJECT["project"]["scripts"]["emoe"].partition(":")
    assert (module, getattr(emoe, function)) == ("serve.emoe", emoe.main)


def test_serve_gets_the_rest_of_the_line_and_gives_the_status(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    monkeypatch.setattr(server, "main", lambda arguments, command: given.append(list(arguments)) or 7)
    assert emoe.main(["serve", "--port", "9000", "--model", "serve"]) == 7
    assert given == [["--port", "9000", "--model", "serve"]]


@pytest.mark.parametrize(
    ("main", "arguments", "name"),
    [(emoe.main, ["serve", "--help"], "emoe serve"), (server.main, ["--help"], "python -m serve.main")],
)
def test_help_names_the_command_that_was_called(
    main: Callable[[list[str]], int], arguments: list[str], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: {name} [-h]")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [([], "emoe needs a command"), (["srve"], "'srve'"), (["--port", "1"], "'--port'"), (["x", "bench"], "'x'")],
)
def test_an_unknown_command_is_one_line_that_lists_the_commands(
    arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert emoe.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert problem in err
    assert all(command in err for command in COMMANDS)


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert emoe.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {command} " in out for command in COMMANDS)


@pytest.mark.parametrize("called", [name for name, _ in leaves()])
def test_every_command_has_a_help_text_that_names_it(called: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        emoe.main([*called.split()[1:], "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: {called} [-h]")


@pytest.mark.parametrize("group", [name for name, command in COMMANDS.items() if command.parts])
def test_a_group_lists_its_commands_and_names_the_nearest(group: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert emoe.main([group, "--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {part} " in out for part in COMMANDS[group].parts)
    assert emoe.main([group]) == emoe.main([group, "trian"]) == 2
    err = capsys.readouterr().err
    assert f"emoe {group} needs a command" in err
    assert f"emoe {group} has no command 'trian'" in err


@pytest.mark.parametrize(("typed", "meant"), [("plna", "plan"), ("server", "serve")])
def test_an_unknown_command_gets_the_nearest_name(typed: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert emoe.main([typed]) == 2
    assert f"emoe has no command {typed!r}, did you mean {meant!r}?" in capsys.readouterr().err


def test_the_version_is_that_of_the_project_and_loads_no_jax() -> None:
    assert emoe_jax.__version__ == PROJECT["project"]["version"]
    code = "import sys; from serve.emoe import main; main(['--version']); sys.exit('jax' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (ran.returncode, ran.stdout) == (0, f"emoe-jax {PROJECT['project']['version']}\n")


def test_type_checkers_are_told_of_the_annotations() -> None:
    assert (ROOT / "emoe_jax" / "py.typed").is_file()
    assert "py.typed" in PROJECT["tool"]["setuptools"]["package-data"]["emoe_jax"]
