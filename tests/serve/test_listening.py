"""Where the server listens, and what it answers before it has a model."""

import os
import socket
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from emoe_jax.errors import ConfigError
from serve.http.hosts import ANY, hosts_for
from serve.http.lobby import open_lobby
from serve.http.server import bind, url_of
from serve.http.uds import bind_uds
from tests.serve.process import ServerProcess


@pytest.fixture
def lobby() -> Iterator[httpx.Client]:
    with (
        bind("127.0.0.1", 0) as listener,
        open_lobby(listener, (ANY,), read_timeout=5.0, send_timeout=5.0),
        httpx.Client(base_url=url_of(listener), timeout=10) as client,
    ):
        yield client


@pytest.mark.parametrize("path", ["/ready", "/health", "/v1/health", "/v1/models", "/metrics", "/", "/nothing"])
def test_everything_is_unavailable_while_the_model_loads(lobby: httpx.Client, path: str) -> None:
    answer = lobby.get(path, headers={"x-request-id": "mine"})
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "loading"
    assert int(answer.headers["retry-after"]) > 0
    assert answer.headers["x-request-id"] == "mine"
    assert (lobby.head(path).status_code, lobby.head(path).content) == (503, b"")


def test_the_lobby_reads_what_it_refuses(lobby: httpx.Client) -> None:
    for _ in range(3):
        for size, status in ((2, 503), (2**20, 503), (9 * 2**20, 413)):
            assert lobby.post("/v1/completions", content=b'"' + b"x" * size + b'"').status_code == status


def test_connections_between_lobby_and_server_wait() -> None:
    with bind("127.0.0.1", 0) as listener:
        url = url_of(listener)
        with open_lobby(listener, (ANY,), read_timeout=5.0, send_timeout=5.0):
            assert httpx.get(url).status_code == 503
        answers: list[int] = []
        waiting = threading.Thread(target=lambda: answers.append(httpx.get(url, timeout=10).status_code))
        waiting.start()
        time.sleep(0.1)
        assert not answers
        with open_lobby(listener, ("elsewhere",), read_timeout=5.0, send_timeout=5.0):
            waiting.join()
        assert answers == [400]


def test_a_half_sent_request_does_not_keep_the_lobby_open() -> None:
    with bind("127.0.0.1", 0) as listener:
        with open_lobby(listener, (ANY,), read_timeout=60.0, send_timeout=60.0):
            idle = [socket.create_connection(listener.getsockname()) for _ in range(2)]
            idle[0].sendall(b"GET /ready HT")
            idle[1].sendall(b"POST /ready HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
            time.sleep(0.1)
            began = time.monotonic()
        assert time.monotonic() - began < 4
        for connection in idle:
            connection.close()


def test_two_servers_cannot_have_one_port_even_while_both_load() -> None:
    with bind("127.0.0.1", 0) as listener, pytest.raises(ConfigError, match="port"):
        bind("127.0.0.1", listener.getsockname()[1])


def test_a_unix_socket_is_for_user_and_group_and_goes_with_the_server(tmp_path: Path) -> None:
    path = tmp_path / "server.sock"
    mask = os.umask(0)
    try:
        with bind_uds(str(path)) as listener:
            mode = path.stat().st_mode
            assert stat.S_ISSOCK(mode)
            assert stat.S_IMODE(mode) == 0o660
            assert url_of(listener) == f"unix:{path}"
            assert hosts_for(listener, ["a"]) == ["a"]
            assert hosts_for(listener, []) == (ANY,)
            with (
                open_lobby(listener, (ANY,), read_timeout=5.0, send_timeout=5.0),
                httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://x") as client,
            ):
                assert client.get("/ready").status_code == 503
        assert not path.exists()
        assert os.umask(0) == 0  # given back
    finally:
        os.umask(mask)


def test_a_unix_socket_that_a_dead_server_left_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "server.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with bind_uds(str(path)), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))


def test_what_is_in_the_way_of_a_unix_socket_is_named_and_left(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine", encoding="utf-8")
    link = tmp_path / "link"
    link.symlink_to(file)
    for path, reason in (
        (file, "is no socket"),
        (link, "is no socket"),
        (tmp_path, "is no socket"),
        (tmp_path / "missing" / "x.sock", "No such file or directory"),
        (tmp_path / ("x" * 200), "too long"),
        (file / "x", "Not a directory"),
    ):
        with pytest.raises(ConfigError, match=reason), bind_uds(str(path)):
            pass
    assert file.read_text(encoding="utf-8") == "mine"
    path = tmp_path / "live.sock"
    with bind_uds(str(path)), pytest.raises(ConfigError, match="another server listens there"), bind_uds(str(path)):
        pass


def test_a_unix_socket_that_another_server_put_there_stays(tmp_path: Path) -> None:
    path = tmp_path / "server.sock"
    with socket.socket(socket.AF_UNIX) as other:
        with bind_uds(str(path)):
            path.unlink()
            other.bind(str(path))
        assert path.exists()


def test_from_loading_to_serving_on_a_unix_socket(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "server.sock"
    arguments = ("--model", str(tiny), "--max-num-seqs", "1", "--max-num-batched-tokens", "16")
    server = ServerProcess((*arguments, "--root-path", "/llm"), listen=("--uds", str(path)))
    try:
        server.wait_for("loading: ", 300)  # which importing takes on a busy machine
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://x", timeout=60) as client:
            loading = client.get("/llm/ready")
            assert (loading.status_code, loading.json()["error"]["code"]) == (503, "loading")
            server.wait_until_ready(300)
            assert server.url == f"unix:{path}"
            assert client.get("/llm/ready").status_code == client.get("/ready/").status_code == 200
            assert client.post("/llm/v1/completions/", json={"prompt": "hi", "top_p": 0}).status_code == 200
        server.process.terminate()
        assert server.wait(60) == 0
        assert not path.exists()
        assert "Traceback" not in "".join(server.output)
    finally:
        server.close()
