"""`emoe doctor`: what each check says of a machine that lacks something, and that nothing ends it with a traceback."""

import importlib.metadata
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from emoe_jax.planning import rates
from serve import checks, doctor, emoe
from serve.checks import Finding


def found(check: checks.Check) -> dict[str, Finding]:
    return {finding.check: finding for finding in check()}


def test_a_sound_machine_passes_every_check(capsys: pytest.CaptureFixture[str]) -> None:
    """With the tiny step: a model that is loaded, compiled and asked."""
    assert emoe.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    by_name = {finding["check"]: finding for finding in report["findings"]}
    assert report["status"] in ("ok", "warning")
    assert {"Python", "packages", "web packages", "JAX", "device", "device memory", "link"} <= set(by_name)
    assert by_name["a step"]["found"].startswith("2 tokens of a tiny model in ")
    assert all(bool(one["mend"]) == (one["level"] != "ok") for one in report["findings"])


def _say(level: Any) -> checks.Check:
    def check() -> Iterator[Finding]:
        yield Finding("a part", level, "as found", "" if level == "ok" else "mend it so")

    return check


@pytest.mark.parametrize(
    ("levels", "worst", "status"),
    [(["ok"], "ok", 0), (["ok", "warning"], "warning", 0), (["problem", "ok", "warning"], "problem", 1)],
)
def test_the_status_is_that_of_the_worst(
    levels: list[str], worst: str, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checks, "CHECKS", tuple(map(_say, levels)))
    assert doctor.main(["--no-step", "--json"]) == status
    assert json.loads(capsys.readouterr().out)["status"] == worst
    assert doctor.main(["--no-step"]) == status
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if not line.startswith(" ")] == levels
    assert sum(line.strip() == "-> mend it so" for line in lines) == len(levels) - levels.count("ok")


def test_a_check_that_fails_is_a_problem_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken_driver() -> Iterator[Finding]:
        raise RuntimeError("no device\nis found")
        yield

    monkeypatch.setattr(checks, "CHECKS", (broken_driver, _say("ok")))
    assert doctor.main(["--no-step"]) == 1
    out, err = capsys.readouterr()
    assert "problem  broken driver       RuntimeError: no device is found\n" in out
    assert "ok       a part" in out
    assert "Traceback" not in out + err


def test_packages_of_another_version_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["jax>=99", "absent-one", "torch; extra == 'x'"])
    [python, packages] = checks.python_and_packages()
    assert (python.check, python.level) == ("Python", "ok")
    assert packages.level == "problem"
    assert packages.found == "missing, or of another version: jax>=99, absent-one"
    monkeypatch.setattr(importlib.metadata, "metadata", lambda name: {"Requires-Python": ">=4"})
    [python, _] = checks.python_and_packages()
    assert (python.level, python.mend) == ("problem", "use Python >=4")


def test_a_checkout_that_is_not_installed_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def metadata(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "metadata", metadata)
    assert [(one.check, one.level) for one in checks.python_and_packages()] == [("package", "warning")]


def test_web_packages_that_do_not_import_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "WEB", ("fastapi", "no_such_package"))
    finding = found(checks.web_packages)["web packages"]
    assert (finding.level, finding.found) == ("problem", "cannot import no_such_package (ModuleNotFoundError)")


def test_a_card_that_jax_does_not_use_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "nvidia_cards", lambda: [("NVIDIA L4", "550.1", 8.9)])
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    finding = found(checks.jax_and_device)["device"]
    assert (finding.level, finding.found) == ("warning", "JAX uses the CPU, although there is NVIDIA L4")
    assert finding.mend == "pip install 'emoe-jax[cuda12]'"
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert found(checks.jax_and_device)["device"].mend == "unset JAX_PLATFORMS"


@pytest.mark.parametrize(("capability", "level"), [(7.5, "problem"), (8.0, "ok")])
def test_a_card_must_be_new_enough(capability: float, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(platform="gpu", device_kind="a card")])
    monkeypatch.setattr(checks, "nvidia_cards", lambda: [("a card", "550.1", capability)])
    by_name = found(checks.jax_and_device)
    assert (by_name["device"].found, by_name["driver"].level) == ("1 x a card (gpu)", level)


@pytest.mark.parametrize(("rate", "level"), [(5e9, "warning"), (25e9, "ok")])
def test_a_slow_link_is_a_warning(rate: float, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "link_bandwidth", lambda: rate)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    finding = found(checks.link)["link"]
    assert (finding.level, finding.found) == (level, f"{rate / 1e9:.1f} GB/s from the host to the device")


def test_page_locked_memory_is_tried_on_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "not needed on a CPU" in found(checks.page_locked_memory)["page-locked memory"].found
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert "64 MiB can be had" in found(checks.page_locked_memory)["page-locked memory"].found  # a CPU lends it, too

    def refuse(*arguments: Any) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(jax, "device_put", refuse)
    finding = found(checks.page_locked_memory)["page-locked memory"]
    assert finding.level == "warning"
    assert "64 MiB cannot be had: RuntimeError" in finding.found


def test_a_folder_that_cannot_be_written_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "file"))
    finding = found(checks.folders)["compiled steps"]
    assert finding.level == "problem"
    assert finding.found.startswith(f"{tmp_path / 'file'}: ")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "new" / "folder"))
    assert found(checks.folders)["compiled steps"].level == "ok"
    assert not (tmp_path / "new").exists()  # looking makes nothing
    usage = SimpleNamespace(free=checks.LITTLE_SPACE - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    assert found(checks.folders)["compiled steps"].level == "warning"


@pytest.mark.parametrize(("text", "level"), [("65529\n", "warning"), ("65530\n", "ok"), (None, "ok"), ("x", "ok")])
def test_few_memory_maps_are_a_warning(text: str | None, level: str, tmp_path: Path) -> None:
    path = tmp_path / "max_map_count"
    if text is not None:
        path.write_text(text)
    [finding] = checks.memory_maps(path)
    assert finding.level == level


def test_little_memory_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emoe_jax.memory.plan.usable_memory", lambda: checks.LITTLE_MEMORY - 1)
    assert found(checks.device_memory)["device memory"].level == "warning"


@pytest.mark.parametrize(
    ("answer", "cards"),
    [
        ("an H200, 570.1, 9.0\nan L4, 570.1, 8.9\n", [("an H200", "570.1", 9.0), ("an L4", "570.1", 8.9)]),
        ("no devices were found", []),
        (None, []),
    ],
)
def test_cards_are_those_of_nvidia_smi(
    answer: str | None, cards: list[tuple[str, str, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*arguments: Any, **options: Any) -> SimpleNamespace:
        if answer is None:
            raise subprocess.TimeoutExpired("nvidia-smi", 30)
        return SimpleNamespace(stdout=answer)

    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(subprocess, "run", run)
    assert checks.nvidia_cards() == cards
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert checks.nvidia_cards() == []


def test_an_unknown_flag_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        doctor.main(["--jsn"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: unknown option '--jsn'; the nearest known one is '--json'\n"
