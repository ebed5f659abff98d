"""The page at `/`: what it is served with, and what a person sees of it in a browser."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve.dashboard import PAGE
from tests.serve.conftest import StartServer, serving
from tests.serve.fake import FakeEngine, FakeTokenizer
from tests.serve.fleet import Fleet
from tests.serve.states import engine_state

TEXT = PAGE.read_text(encoding="utf-8")
CHROMIUM = os.environ.get("EMOE_CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
"""The browser of the system, if it has one; without one, that of `playwright install`."""


class LivelyEngine(FakeEngine):
    """Each look at its state comes with a load, and two wishes of which one is covered."""

    looks = 0

    def state(self) -> dict[str, Any]:
        self.looks += 1
        state = engine_state()
        residency = state["residency"]
        residency["wishes"][0][0] += self.looks
        residency["wishes"][1][0] += self.looks
        residency["coverage"] = (17 + self.looks) / (20 + 2 * self.looks)
        residency["loads"]["loads"] += self.looks
        state["steps"] += self.looks
        return state


def test_is_served_without_a_key_and_may_do_nothing_else(start_server: StartServer) -> None:
    with start_server(FakeEngine(FakeTokenizer()), api_keys=["secret"]) as client:
        response = client.get("/")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert response.text == TEXT
    policy = response.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert response.headers["x-content-type-options"] == "nosniff"


def test_needs_nothing_from_elsewhere() -> None:
    assert not re.search(r"https?:|//[a-z]|@import|url\(|<link(?! rel=\"icon\" href=\"data:,\")|<img|<iframe", TEXT)
    assert not re.search(r"innerHTML|insertAdjacent|document\.write|\beval\b| style=| on[a-z]+=", TEXT)


def test_asks_for_what_the_server_has(client: httpx.Client) -> None:
    paths = set(re.findall(r'ask\("([^"]+)"', TEXT))
    assert {f"/{path}" for path in paths} <= client.get("/openapi.json").json()["paths"].keys()
    identifiers = set(re.findall(r'id="([^"]+)"', TEXT))
    assert set(re.findall(r'element\("([^"]+)"\)', TEXT)) <= identifiers
    described = re.findall(r'aria-(?:labelledby|describedby)="([^"]+)"', TEXT)
    assert set(described) <= identifiers


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_the_script_parses(tmp_path: Path) -> None:
    script = tmp_path / "dashboard.mjs"
    script.write_text(TEXT.partition('<script type="module">')[2].partition("</script>")[0], encoding="utf-8")
    checked = subprocess.run(["node", "--check", str(script)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the browser extra")
    with playwright.sync_playwright() as started:
        try:
            browser = started.chromium.launch(
                executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"]
            )
        except playwright.Error as error:
            if CHROMIUM is not None:
                raise
            pytest.skip(f"no browser is installed: {str(error).splitlines()[0]}")
        yield browser
        browser.close()


def opened(browser: Any, client: httpx.Client, **options: Any) -> tuple[Any, list[str]]:
    """The page, and what its console complains of."""
    page = browser.new_page(**options)
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(str(client.base_url))
    return page, complaints


def colors_of(page: Any, canvas: str) -> int:
    """How many colors a canvas shows."""
    return page.evaluate(
        """(id) => {
            const canvas = document.getElementById(id);
            const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
            return new Set(new Uint32Array(data.buffer)).size;
        }""",
        canvas,
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_chat_and_the_slab(browser: Any, start_server: StartServer, scheme: str) -> None:
    engine = LivelyEngine(FakeTokenizer())
    with start_server(engine) as client:
        page, complaints = opened(browser, client, color_scheme=scheme)
        page.get_by_text("4 of 8 experts resident, 1 loading").wait_for()
        assert colors_of(page, "slab") > 4
        page.get_by_label("Message").fill("hello")
        page.get_by_label("Routing").select_option("exact")
        page.get_by_label("Tokens at most").fill("5")
        page.keyboard.press("Tab")
        page.get_by_role("button", name="Send").click()
        page.get_by_text("task conv · exact · 25 % substituted · 5 tokens").wait_for()
        assert page.locator(".assistant p").inner_text() == "abcde"
        page.get_by_text("coverage 50 %, promised –").wait_for()
        assert page.locator("#planner").get_by_text("counts").is_visible()
        assert page.get_by_role("row", name="qa 3 10 % 4 % 50 %").is_visible()
        assert page.get_by_role("row", name="lru 70 % 60 % 2.5").is_visible()
        assert page.get_by_text("perplexity may lie 1 % above that of all experts").is_visible()
        lost = "bounded, qa 11 1.004× (1.002–1.006) 0.970 (0.950–0.990) 0.0040 (0.0020–0.0060) 0.21"
        assert page.get_by_role("row", name=lost).is_visible()
        assert page.get_by_text("256 steps judged, 12 left out").is_visible()
        assert page.locator("#model").inner_text() == "fake · mixtral · resident · emoe"
        unaudited = "resident, sum 1 1.650× 0.600 0.5000 –"
        assert page.get_by_role("row", name=unaudited, exact=True).is_visible()
        assert page.get_by_text("1 % of the answers are audited").is_visible()
        assert page.get_by_role("heading", name="Replicas").count() == 0  # of a single server nothing of them is shown
        assert not complaints
        page.close()
    assert [request["routing"] for request in engine.requests] == ["exact"]


def test_goes_on_when_the_server_comes_back_and_asks_for_a_key(browser: Any, start_server: StartServer) -> None:
    with start_server(LivelyEngine(FakeTokenizer()), api_keys=["secret"]) as client:
        page, _ = opened(browser, client)
        page.get_by_label("API key").fill("secret")
        page.get_by_role("button", name="Use it").click()
        page.get_by_text("live", exact=True).wait_for()
        assert page.get_by_label("API key").is_hidden()
        page.route("**/v1/emoe/state", lambda route: route.abort())
        page.get_by_text("no answer, trying again").wait_for()
        page.unroute("**/v1/emoe/state")
        page.get_by_text("live", exact=True).wait_for()
        page.get_by_label("Message").fill("hello")
        page.locator("#task").fill("x" * 64)
        page.get_by_label("Tokens at most").fill("5000")
        page.keyboard.press("Enter")
        page.locator(".message.failed").get_by_text("maximum context length is").first.wait_for()
        page.close()


def test_what_answers_say_is_text(browser: Any, start_server: StartServer) -> None:
    with start_server(LivelyEngine(FakeTokenizer())) as client:
        page, complaints = opened(browser, client)
        event = {"choices": [{"delta": {"content": "<img src=x onerror=alert(1)>"}}]}
        body = f"data: {json.dumps(event)}\n\ndata: [DONE]\n\n"
        page.route("**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=body))
        page.get_by_label("Message").fill("hello")
        page.keyboard.press("Enter")
        page.get_by_text("<img src=x").wait_for()
        assert page.locator("img").count() == 0
        assert not complaints
        page.close()


class ReplicaEngine(LivelyEngine):
    """Of one replica: its residents serve some tasks better than others."""

    def __init__(self, serves: dict[str, float], ended: int, experts: list[list[int]]):
        super().__init__(FakeTokenizer())
        self._changes = serves, ended, experts

    def state(self) -> dict[str, Any]:
        state = super().state()
        state["planner"]["serves"], state["scheduler"]["slo"]["ended"], state["residency"]["experts"] = self._changes
        return state


def test_replicas_and_the_one_that_is_shown(browser: Any) -> None:
    fleet = Fleet(
        {
            "north": ReplicaEngine({"qa": 0.8, "conv": 0.4}, 30, [[0], [2, 3]]),
            "south": ReplicaEngine({"qa": 0.3, "sum": 0.6}, 10, [[0, 1], [2, 3]]),
        }
    )
    with serving(fleet) as client:
        page, complaints = opened(browser, client)
        page.get_by_role("row", name="south (shown below) 10 25 % 1 2 1 50 % 87 % – 30 % 60 %", exact=True).wait_for()
        assert page.get_by_role("row", name="north 30 75 % 1 2 1 50 % 87 % 40 % 80 % –", exact=True).is_visible()
        assert page.get_by_text("2 replicas, 40 answers").is_visible()
        assert page.locator("#replica-columns").inner_text().split()[-3:] == ["conv", "qa", "sum"]
        assert page.get_by_text("4 of 8 experts resident").is_visible()
        page.get_by_label("Show below").select_option("north")
        page.get_by_role("row", name="north (shown below)").wait_for()
        assert page.get_by_text("3 of 8 experts resident").is_visible()
        page.get_by_label("Message").fill("hello")
        page.get_by_role("button", name="Send").click()
        page.get_by_text("by replica south").wait_for()  # the chat goes to whichever replica is given it
        fleet.servers.pop("north")
        page.get_by_role("row", name="south (shown below) 10 100 %").wait_for()
        assert page.get_by_text("1 replica, 10 answers").is_visible()
        assert page.get_by_text("4 of 8 experts resident").is_visible()
        assert not complaints
        page.close()
