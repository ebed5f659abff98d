"""GET /: the dashboard, one page that needs nothing from elsewhere."""

import base64
import hashlib
import re
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

PAGE = Path(__file__).with_name("dashboard.html")


def dashboard_routes() -> APIRouter:
    """A router with the one route. The page is read now; a missing file raises `OSError`."""
    router = APIRouter()
    page = PAGE.read_text(encoding="utf-8")
    headers = {
        "content-security-policy": content_security_policy(page),
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }

    @router.get("/", include_in_schema=False)
    async def dashboard() -> HTMLResponse:
        return HTMLResponse(page, headers=headers)

    return router


def content_security_policy(page: str) -> str:
    """Allows the page's own script and styles, by their hashes, and calls to this server; nothing else."""
    script, style = (_hash(page, tag) for tag in ("script", "style"))
    return (
        f"default-src 'none'; script-src '{script}'; style-src '{style}'; img-src data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    )


def _hash(page: str, tag: str) -> str:
    """Of the content of the page's only element of a kind."""
    (content,) = re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", page, re.DOTALL)
    return f"sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}"
