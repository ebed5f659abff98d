"""What `deploy/` has: files that parse, files that exist, and metrics and labels that the server has."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.serve.conftest import StartServer
from tests.serve.fake import FakeEngine, FakeTokenizer
from tests.serve.states import engine_state
from tests.serve.test_server import ask

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DASHBOARD = DEPLOY / "grafana" / "dashboards" / "emoe.json"
FROM_PROMETHEUS = {"instance", "job", "le"}


def loaded(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def panels() -> list[dict[str, Any]]:
    return json.loads(DASHBOARD.read_text())["panels"]


def alerts() -> list[dict[str, Any]]:
    return [rule for group in loaded(DEPLOY / "prometheus" / "alerts.yml")["groups"] for rule in group["rules"]]


def queries() -> Iterator[str]:
    dashboard = json.loads(DASHBOARD.read_text())
    yield from (target["expr"] for panel in panels() for target in panel.get("targets", []))
    yield from (variable["query"]["query"] for variable in dashboard["templating"]["list"])
    yield from (alert["expr"] for alert in alerts())


@pytest.fixture
def served(start_server: StartServer, monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """The labels of each sample that a server with all kinds of traffic has."""
    monkeypatch.setattr(FakeEngine, "state", lambda _: engine_state())
    with start_server(FakeEngine(FakeTokenizer())) as client:
        assert ask(client).status_code == 200
        text = client.get("/metrics").text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {sample.name: set(sample.labels) for sample in samples}


def test_every_metric_in_a_query_is_one_of_the_server(served: dict[str, set[str]]) -> None:
    named = {name for query in queries() for name in re.findall(r"\b(?:emoe:|process_)\w+", query)}
    assert len(named) > 30
    assert named <= served.keys()


def test_every_label_in_a_query_is_one_of_its_metrics(served: dict[str, set[str]]) -> None:
    for query in queries():
        labels = {name for group in re.findall(r"by \(([^)]*)\)", query) for name in re.split(r",\s*", group)}
        labels |= set(re.findall(r"(\w+)=~?\"", query))
        known = {label for name in re.findall(r"\b(?:emoe:|process_)\w+", query) for label in served[name]}
        assert labels <= known | FROM_PROMETHEUS, query


def test_legends_and_annotations_show_labels_that_their_query_has() -> None:
    shown = [(target["expr"], target["legendFormat"]) for panel in panels() for target in panel.get("targets", [])]
    for query, legend in shown:
        grouped = {name for group in re.findall(r"by \(([^)]*)\)", query) for name in re.split(r",\s*", group)}
        assert set(re.findall(r"{{(\w+)}}", legend)) <= grouped | ({"instance"} if "by (" not in query else set())


def test_panels_do_not_overlap_and_have_names_of_their_own() -> None:
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels())
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
    assert len({panel["title"] for panel in panels()}) == len({panel["id"] for panel in panels()}) == len(panels())


def test_compose_names_files_and_volumes_that_there_are() -> None:
    compose = loaded(DEPLOY / "compose.yaml")
    mounts = [mount.split(":")[0] for service in compose["services"].values() for mount in service.get("volumes", [])]
    assert all((DEPLOY / mount).is_dir() for mount in mounts if mount.startswith("."))
    assert {mount for mount in mounts if not mount.startswith(".")} == set(compose["volumes"])
    assert (DEPLOY / compose["services"]["emoe"]["build"]["context"]).resolve() == ROOT
    assert (ROOT / compose["services"]["emoe"]["build"]["dockerfile"]).is_file()
    target = loaded(DEPLOY / "prometheus" / "prometheus.yml")["scrape_configs"][0]["static_configs"][0]["targets"][0]
    assert target.split(":")[0] in compose["services"]
    source = loaded(DEPLOY / "grafana" / "provisioning" / "datasources" / "prometheus.yaml")["datasources"][0]
    assert source["url"] == "http://prometheus:9090"
    assert {target["datasource"]["uid"] for panel in panels() for target in panel.get("targets", [])} == {source["uid"]}
    cuda = loaded(DEPLOY / "compose.cuda.yaml")
    assert cuda["services"].keys() == {"emoe"}
    assert all(":latest" not in service["image"] for name, service in compose["services"].items() if name != "emoe")


def test_the_image_copies_what_there_is_and_passes_flags_that_there_are() -> None:
    lines = (DEPLOY / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    copied = [source for line in lines if re.match(r"COPY (?!--from)", line) for source in line.split()[1:-1]]
    kept = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    assert len(copied) >= 8
    assert all((ROOT / source).exists() and f"!{source}" in kept for source in copied)
    constraints = re.findall(r"^ARG CONSTRAINTS=(\S+)", "\n".join(lines), re.MULTILINE)
    assert (ROOT / constraints[0]).is_file()
    python = re.findall(r"^ARG PYTHON=(\S+)", "\n".join(lines), re.MULTILINE)
    assert constraints[0] == f"requirements/py{python[0].replace('.', '')}.txt"


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool")
def test_prometheus_takes_configuration_and_rules() -> None:
    folder = DEPLOY / "prometheus"
    for kind, file in (("config", "prometheus.yml"), ("rules", "alerts.yml")):
        run = subprocess.run(["promtool", "check", kind, folder / file], capture_output=True, text=True, timeout=60)
        assert run.returncode == 0, run.stdout + run.stderr
