"""ASGI middleware in front of every route: hosts, API keys, request ids, and an answer when a route fails."""

import hashlib
import hmac
import logging
import re
import uuid
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.errors import ApiError, error_response
from serve.http.hosts import names_one_of

log = logging.getLogger("serve")

DOCUMENTS = frozenset({"/docs", "/redoc", "/openapi.json"})
OPEN_PATHS = frozenset({"/", "/health", "/v1/health", "/ready", "/metrics", *DOCUMENTS})
"""What needs no key. Browsers cannot send one for pages; what the documents say is in the repository, too."""
REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class Guard:
    """Answers 400 to a Host that is none of `hosts`, 401 without a valid key (when keys are set), and echoes
    `x-request-id`, or makes one up where there is none or one with other characters than ids have.

    Routes find the hash of the request's key as `request.state.tenant`, None where all clients have the same.
    """

    def __init__(self, app: ASGIApp, api_keys: Sequence[str], hosts: Sequence[str]):
        self.app = app
        self._hosts = hosts
        self._digests = list({_digest(key.encode()): None for key in api_keys})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = headers.get("x-request-id", "")
        if not REQUEST_ID.fullmatch(request_id):
            request_id = uuid.uuid4().hex
        refusal = None
        key = self._key(headers)
        if self._digests and scope["path"] not in OPEN_PATHS and key is None:
            refusal = ApiError(
                401,
                "a valid API key is needed: Authorization: Bearer KEY, or x-api-key: KEY",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        if not names_one_of(headers, self._hosts):
            message = "the Host header names none of this server's hosts (--allowed-hosts)"
            refusal = ApiError(400, message, param="host", code="invalid_host")
        scope.setdefault("state", {})["request_id"] = request_id
        scope["state"]["tenant"] = key if len(self._digests) > 1 else None

        answered = False

        async def send_with_id(message: Message) -> None:
            nonlocal answered
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
                answered = True
            await send(message)

        try:
            await (error_response(refusal, scope["path"]) if refusal else self.app)(scope, receive, send_with_id)
        except Exception as error:
            if answered:
                raise
            log.error("a route failed", exc_info=error, extra={"fields": {"request_id": request_id}})
            await error_response(error, scope["path"])(scope, receive, send_with_id)

    def _key(self, headers: Headers) -> bytes | None:
        """The hash of the key that a request has, None without a valid one."""
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = [key.strip()] if scheme.lower() == "bearer" else []
        given += headers.getlist("x-api-key")
        # Compare with every key, each in constant time: neither the content nor the position of a key leaks.
        digests = [_digest(key.strip().encode("latin-1")) for key in given]
        matches = [digest for one in digests for digest in self._digests if hmac.compare_digest(one, digest)]
        return matches[0] if matches else None


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
