"""Which names the server answers to."""

import httpx
import pytest

from serve.http.hosts import LOOPBACK, hosts_of
from tests.serve.conftest import StartServer
from tests.serve.fake import FakeEngine, FakeTokenizer
from tests.serve.test_hostile import raw_status


@pytest.mark.parametrize(
    ("address", "allowed", "expected"),
    [
        ("127.0.0.1", [], {*LOOPBACK}),
        ("::1", [], {*LOOPBACK}),
        ("127.0.1.1", ["box.lan"], {*LOOPBACK, "127.0.1.1", "box.lan"}),
        ("127.0.0.1", ["*"], {*LOOPBACK, "*"}),
        ("0.0.0.0", [], {"*"}),
        ("::", [], {"*"}),
        ("fe80::1%eth0", [], {"*"}),
        ("192.168.1.5", ["box.lan"], {"box.lan"}),
    ],
)
def test_names_by_address(address: str, allowed: list[str], expected: set[str]) -> None:
    assert set(hosts_of(address, allowed)) == expected


@pytest.mark.parametrize(
    ("host", "status"),
    [
        (b"localhost", 200),
        (b"LocalHost:8000", 200),
        (b"127.0.0.1:80", 200),
        (b"[::1]:8000", 200),
        (b"box.lan:1", 200),
        (b"evil.example", 400),
        (b"evil.example:8000", 400),
        (b"localhost.evil.example", 400),
        (b"localhost:8000.evil.example", 400),
        (b"127.0.0.1@evil.example", 400),
        (b"localhost,evil.example", 400),
        (b"[::1]evil.example", 400),
        (b"[::1", 400),
        (b"\xff", 400),
        (b"", 400),
        (b"*", 400),
    ],
)
def test_only_its_names(start_server: StartServer, host: bytes, status: int) -> None:
    hosts = hosts_of("127.0.0.1", ["box.lan"])
    with start_server(FakeEngine(FakeTokenizer()), hosts=hosts) as client:
        assert raw_status(client, b"Host: " + host) == status


def test_a_wrong_name_is_told_so(start_server: StartServer) -> None:
    with start_server(FakeEngine(FakeTokenizer()), hosts=LOOPBACK, api_keys=["secret"]) as client:
        answer = client.get("/v1/models", headers={"host": "evil.example"})
        error = answer.json()["error"]
        assert (answer.status_code, error["param"], error["code"]) == (400, "host", "invalid_host")
        assert "evil" not in answer.text
        assert httpx.get(f"http://localhost:{client.base_url.port}/health").status_code == 200
