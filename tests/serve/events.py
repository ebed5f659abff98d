"""Reading a stream of server-sent events."""

import json
from typing import Any

import httpx


def events_of(client: httpx.Client, path: str, **body: Any) -> list[dict[str, Any]]:
    """All events of a streamed answer but the final `[DONE]`."""
    with client.stream("POST", path, json=body) as response:
        assert response.status_code == 200, response.read()
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
