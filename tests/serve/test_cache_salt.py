"""Who may reuse whose prompts: salts of requests, and one for each of several API keys."""

from collections.abc import Sequence
from typing import Any

import httpx
import pytest

from serve.options import parse_options
from serve.schema import MAX_CACHE_SALT
from tests.serve.conftest import StartServer
from tests.serve.fake import FakeEngine, FakeTokenizer

BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "hi", "max_tokens": 2},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2},
}


@pytest.mark.parametrize("path", list(BODIES))
@pytest.mark.parametrize("stream", [False, True])
def test_the_engine_gets_the_salt(start_server: StartServer, path: str, stream: bool) -> None:
    salts = ["a", "x" * MAX_CACHE_SALT, " ", "\u2028", None]
    engine = FakeEngine(FakeTokenizer())
    with start_server(engine) as client:
        for salt in salts:
            body = {**BODIES[path], "stream": stream, "cache_salt": salt}
            assert client.post(path, json=body).status_code == 200
        assert client.post(path, json=BODIES[path]).status_code == 200
    assert [request["cache_salt"] for request in engine.requests] == [*salts, None]


@pytest.mark.parametrize("path", list(BODIES))
@pytest.mark.parametrize("salt", ["", "x" * (MAX_CACHE_SALT + 1), 5, ["a"], {}, True])
def test_what_is_no_salt_is_refused(client: httpx.Client, path: str, salt: Any) -> None:
    answer = client.post(path, json={**BODIES[path], "cache_salt": salt})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "cache_salt")
    assert "; expected " in error["message"]
    assert "xx" not in answer.text


def salts_of(start_server: StartServer, api_keys: Sequence[str], requests: Sequence[dict[str, Any]]) -> list[Any]:
    """What the engine gets for requests of headers and, as `salt`, a salt of their own."""
    engine = FakeEngine(FakeTokenizer())
    with start_server(engine, api_keys=api_keys) as client:
        for request in requests:
            headers = {name: value for name, value in request.items() if name != "salt"}
            for path, body in BODIES.items():
                answer = client.post(path, json={**body, "cache_salt": request.get("salt")}, headers=headers)
                assert answer.status_code == 200
    salts = [request["cache_salt"] for request in engine.requests]
    assert salts[::2] == salts[1::2]
    return salts[::2]


def bearer(key: str, salt: str | None = None) -> dict[str, Any]:
    return {"authorization": f"Bearer {key}", **({} if salt is None else {"salt": salt})}


@pytest.mark.parametrize("keys", [["one"], ["one", "one"]])
def test_clients_of_one_key_share(start_server: StartServer, keys: list[str]) -> None:
    requests = [bearer("one"), {"x-api-key": "one"}, bearer("one", "mine")]
    assert salts_of(start_server, keys, requests) == [None, None, "mine"]


def test_clients_of_several_keys_do_not(start_server: StartServer) -> None:
    keys = ["one", "two", "three"]
    requests = [bearer(key, salt) for key in keys for salt in (None, "mine", "yours")]
    salts = salts_of(start_server, keys, requests)
    assert len(set(salts)) == len(requests)
    assert all(salt is not None and not any(key in salt for key in keys) for salt in salts)
    again = [
        {"x-api-key": key, **({} if salt is None else {"salt": salt})}
        for key in keys
        for salt in (None, "mine", "yours")
    ]
    assert salts_of(start_server, keys, again) == salts
    both = {"x-api-key": "wrong", **bearer("two")}
    assert salts_of(start_server, keys, [both]) == salts[3:4]


def test_a_flag_given_twice_has_all_its_values(tmp_path: Any) -> None:
    flags = ["--model", "x", "--api-key", "a", "--api-key", "b", "c", "--allowed-hosts", "h", "--allowed-hosts", "i"]
    options = parse_options([*flags, "--served-model-name", "m", "--served-model-name", "n"])
    assert (options.api_key, options.allowed_hosts) == (["a", "b", "c"], ["h", "i"])
    assert options.served_model_name == ["m", "n"]
    path = tmp_path / "serve.yaml"
    path.write_text("api-key: [d, e]\nallowed-hosts: [j]\n", encoding="utf-8")
    options = parse_options(["--config", str(path), "--model", "x", "--api-key", "a", "--api-key", "b"])
    assert (options.api_key, options.allowed_hosts) == (["a", "b"], ["j"])
    assert parse_options(["--model", "x"]).api_key == []
