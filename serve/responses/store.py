"""Responses that requests may go on from: in memory, and only so many."""

import dataclasses
import json
from collections import OrderedDict

from serve.responses.input import ITEMS, InputItem

MAX_STORED_BYTES = 64 * 2**20
"""Of all responses together, as JSON."""


@dataclasses.dataclass(frozen=True)
class StoredResponse:
    """JSON of a response, and of all items that it is an answer to, earlier responses' included."""

    answer: bytes
    items: bytes

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.answer) + len(self.items)

    def input_items(self) -> list[InputItem]:
        """What it is an answer to."""
        return ITEMS.validate_json(self.items)

    def conversation(self) -> list[InputItem]:
        """What it is an answer to, and the answer."""
        return [*self.input_items(), *ITEMS.validate_python(json.loads(self.answer)["output"])]


class ResponseStore:
    """Forgets what was used least recently. Belongs to the event loop.

    Each response is its owner's alone: the hash of an API key, None where all clients have the same.
    """

    def __init__(self, most: int, most_bytes: int = MAX_STORED_BYTES):
        self._most = most
        self._most_bytes = most_bytes
        self._responses: OrderedDict[tuple[bytes | None, str], StoredResponse] = OrderedDict()
        self.size = 0
        """Bytes of all that is stored."""

    def __len__(self) -> int:
        return len(self._responses)

    def add(self, owner: bytes | None, response_id: str, response: StoredResponse) -> None:
        """Keep a response with a new id, in place of others. One that alone is too large is not kept."""
        if response.size > self._most_bytes:
            return
        self._responses[owner, response_id] = response
        self.size += response.size
        while len(self._responses) > self._most or self.size > self._most_bytes:
            _, forgotten = self._responses.popitem(last=False)
            self.size -= forgotten.size

    def get(self, owner: bytes | None, response_id: str) -> StoredResponse | None:
        """The response, which counts as used now; None where it is not kept."""
        found = self._responses.get((owner, response_id))
        if found is not None:
            self._responses.move_to_end((owner, response_id))
        return found

    def remove(self, owner: bytes | None, response_id: str) -> bool:
        """Forget a response. False where it was not kept."""
        found = self._responses.pop((owner, response_id), None)
        self.size -= 0 if found is None else found.size
        return found is not None
