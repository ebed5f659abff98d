"""The docs keep up with the code: links, paths, commands, flags, metrics and arrays that pages name exist, and back."""

import importlib.util
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml

from emoe_jax.traces.file_format import FORMAT
from serve.telemetry import engine_metrics
from serve.telemetry.metrics import RequestMetrics

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        ROOT / "checkpoints" / "README.md",
        *ROOT.glob(".github/**/*.md"),
    ]
)
REFERENCE = ROOT / "docs" / "reference"
README_LINES = 200

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ +(.+?)\s*$", re.MULTILINE)
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
REPOSITORY_PATH = re.compile(
    r"`((?:emoe_jax|serve|train|benchmarks|tests|checkpoints|examples|docs|requirements|\.github)/[\w./-]*)`"
)
MODULE = re.compile(r"(?:python3?|bin/python) -m ((?:serve|train|benchmarks|tests|emoe_jax)[\w.]*)")
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]+[a-z]")


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def anchors(page: Path) -> set[str]:
    """What links to a page may have after `#`, as GitHub and the site make them of headings."""
    text = FENCE.sub("", page.read_text())
    plain = (re.sub(r"[`*]|\]\([^)]*\)|\[", "", heading).lower() for heading in HEADING.findall(text))
    return {re.sub(r"[^\w -]", "", heading).replace(" ", "-") for heading in plain}


def commands(page: Path) -> list[str]:
    """The lines of a page that start a module of this project, each with what follows on continued lines."""
    joined = page.read_text().replace("\\\n", " ")
    return [line for line in joined.splitlines() if MODULE.search(line)]


@cache
def server_help() -> str:
    run = subprocess.run(
        [sys.executable, "-m", "serve.main", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return run.stdout


@cache
def flags_of(module: str) -> frozenset[str]:
    """The flags of a command: of the server what it says itself, of others what is written in their sources."""
    if module == "serve.main":
        return frozenset(FLAG.findall(server_help()))
    path = ROOT.joinpath(*module.split("."))
    files = [*path.rglob("*.py")] if path.is_dir() else [path.with_suffix(".py")]
    of_server = FLAG.findall(server_help()) if module == "serve.ray_app" else []  # it takes them all
    return frozenset(of_server) | {flag for file in files for flag in FLAG.findall(file.read_text())}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_relative_links_lead_somewhere(page: Path) -> None:
    broken = []
    for target in LINK.findall(FENCE.sub("", page.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_paths_exist(page: Path) -> None:
    missing = [path for path in REPOSITORY_PATH.findall(page.read_text()) if not (ROOT / path).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_tests_that_are_named_exist(page: Path) -> None:
    tests = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page.read_text())
    missing = [f"{file}::{name}" for file, name in tests if f"def {name}(" not in (ROOT / file).read_text()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_commands_and_their_flags_exist(page: Path) -> None:
    unknown = []
    for line in commands(page):
        parts = MODULE.split(line)[1:]
        for module, words in zip(parts[::2], parts[1::2], strict=True):
            module = module.rstrip(".")
            if importlib.util.find_spec(module) is None:
                unknown.append(module)
                continue
            after = words.partition("`")[0].partition("#")[0]
            unknown += [f"{module} {flag}" for flag in FLAG.findall(after) if flag not in {"--help", *flags_of(module)}]
    assert not unknown


def test_flags_of_the_server_are_in_the_reference() -> None:
    text = "\n".join(page.read_text() for page in REFERENCE.glob("*.md"))
    documented = set(FLAG.findall(text))
    flags = {flag for flag in FLAG.findall(server_help()) if flag != "--help"}
    positive = {re.sub("^--no-", "--", flag) for flag in flags}
    assert len(positive) > 30
    assert positive <= documented


def test_metrics_are_in_the_reference_and_the_reverse() -> None:
    documented = set(re.findall(r"`(emoe:\w+)`", (REFERENCE / "metrics.md").read_text()))
    names = {f"emoe:{name}" for name, *_ in engine_metrics.GAUGES + engine_metrics.AUDITED}
    names |= {f"emoe:{name}_total" for name, *_ in engine_metrics.COUNTERS + engine_metrics.RIVALS}
    for kind, name, *_ in engine_metrics.BY_TASK:
        names.add(f"emoe:{name}" + ("_total" if kind is engine_metrics.CounterMetricFamily else ""))
    names |= {
        family.name + ("_total" if family.type == "counter" else "") for family in RequestMetrics().families("a model")
    }
    assert names <= documented
    source = "".join(path.read_text() for path in (ROOT / "serve").rglob("*metrics.py"))
    made_up = {
        name
        for name in documented
        if not re.search(rf"\b{name.removeprefix('emoe:').removesuffix('_total')}\b", source)
    }
    assert not made_up


def test_arrays_of_a_trace_are_in_the_reference() -> None:
    rows = re.findall(r"^\| `(\w+)`( \(optional\))?", (REFERENCE / "trace-format.md").read_text(), re.MULTILINE)
    assert {name: bool(optional) for name, optional in rows} == {
        name: wanted.optional for name, wanted in FORMAT.items()
    }


def test_glossary_has_each_noun_once_and_files_that_exist() -> None:
    rows = re.findall(
        r"^\| ([a-zA-Z][^|]*?) \| .* \| `([^`]+)` \|$", (REFERENCE / "glossary.md").read_text(), re.MULTILINE
    )
    rows = [row for row in rows if row[0] != "noun"]
    nouns = [noun for noun, _ in rows]
    assert len(nouns) > 60
    assert len(nouns) == len(set(nouns))
    assert not [
        owner for _, owner in rows if not any((folder / owner).is_file() for folder in (ROOT / "emoe_jax", ROOT))
    ]


def test_make_targets_that_are_named_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    workflows = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    assert workflows
    named_targets = {
        target
        for file in (*PAGES, *workflows, ROOT / ".ci" / "run")
        for target in re.findall(r"(?:^|[`\s:])make ([a-z][a-z-]+)\b(?=[`\s])", file.read_text())
        if file.suffix != ".md" or f"`make {target}" in file.read_text() or f"\nmake {target}" in file.read_text()
    }
    assert {"setup-all", "lint", "test", "docs"} <= named_targets <= targets


def test_the_workflow_runs_the_targets_of_contributors_on_both_jax_lines() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    jobs = workflow["jobs"]
    assert set(jobs["test"]["strategy"]["matrix"]["python"]) == {"3.11", "3.13"}
    steps = [step["run"].split()[:2] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert [["make", target] in steps for target in ("setup-all", "lint", "test", "docs")] == [True] * 4


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= README_LINES


def test_site_has_every_page() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    listed = set(re.findall(r"[\w/-]+\.md", text))
    assert listed == {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    assert yaml.safe_load(text)["docs_dir"] == "docs"
