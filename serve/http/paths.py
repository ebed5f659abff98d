"""ASGI middleware around everything: brings requests that mean the same to one form."""

from starlette.types import ASGIApp, Receive, Scope, Send

OWN_PATHS = (
    "/",
    "/docs",
    "/docs/oauth2-redirect",
    "/detokenize",
    "/health",
    "/metrics",
    "/openapi.json",
    "/ready",
    "/redoc",
    "/tokenize",
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/emoe/replicas",
    "/v1/emoe/state",
    "/v1/health",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/models",
    "/v1/responses",
)
"""All paths of the server, but those below the last two."""


class Paths:
    """Answers HEAD as GET, a path with slashes at its end as one without, and a path with or without `root_path`.

    Nothing is redirected: a client that follows a redirect may drop its body, or send it to another host. An escaped
    slash (`%2F`) is part of a name, so it stays.
    """

    def __init__(self, app: ASGIApp, root_path: str = ""):
        self.app = app
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            state = {**scope.get("state", {}), "method": scope["method"]}
            path = self._plain(scope["path"], scope.get("raw_path"))
            scope = {**scope, "path": path, "root_path": self._root_path, "state": state}
            if scope["method"] == "HEAD":  # of which the HTTP protocol sends no body, whatever the route gives it
                scope["method"] = "GET"
        await self.app(scope, receive, send)

    def _plain(self, path: str, raw_path: bytes | None) -> str:
        """`raw_path` is the path before `%2F` became a slash."""
        raw = path.encode() if raw_path is None else raw_path.partition(b"?")[0]
        path = path[: len(path) - len(raw) + len(raw.rstrip(b"/"))]
        if path.startswith(f"{self._root_path}/") or path == self._root_path:
            path = path.removeprefix(self._root_path)
        return path or "/"


def hides_own_path(root_path: str) -> str | None:
    """A path of the server that begins with `root_path`, so that it is unclear whether a proxy has removed it."""
    return next((path for path in OWN_PATHS if f"{path}/".startswith(f"{root_path}/")), None)
