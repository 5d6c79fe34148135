"""The static files of the pages: `/` and what it loads. All are in the package; nothing comes from elsewhere.

The pages ask for a key only when an answer is 401 or 403: the files hold nothing that is secret.
"""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from importlib.resources import files
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

PLAYGROUND, FLEET = "playground.html", "fleet.html"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",  # asked about each time, by the tag
}
_LINK = re.compile(
    r'<link rel="(?:stylesheet|icon)" href="/assets/([^"]+)"[^>]*>|<script src="/assets/([^"]+)"></script>'
)


def site_routes(page: str) -> list[Route]:
    """`/` shows `page`; `/assets/...` are the files that the pages load."""

    async def index(request: Request) -> Response:
        return _served(request, page)

    async def asset(request: Request) -> Response:
        return _served(request, request.path_params["name"])

    return [Route("/", index), Route("/assets/{name:path}", asset)]


@cache
def assets() -> dict[str, bytes]:
    """Every file by its name, such as `vendor/uplot.js`."""
    root = files("wisp.api.pages") / "static"
    found: dict[str, bytes] = {}
    folders = [("", root)]
    for prefix, folder in folders:
        for entry in folder.iterdir():
            if entry.is_dir():
                folders.append((f"{prefix}{entry.name}/", entry))
            else:
                found[prefix + entry.name] = entry.read_bytes()
    return found


def self_contained(data: Any) -> str:
    """The fleet page as one file over `data`, a snapshot of a run that is over. Its own policy lets it load nothing."""
    hashes: list[str] = []

    def inlined(match: re.Match[str]) -> str:
        sheet, script = match.groups()
        if script is None:
            return f"<style>{_text(sheet)}</style>" if sheet.endswith(".css") else ""
        code = _text(script)
        assert "</script" not in code.lower(), f"{script} cannot be put into a page"
        digest = hashlib.sha256(code.encode()).digest()
        hashes.append(f"'sha256-{base64.b64encode(digest).decode()}'")
        return f"<script>{code}</script>"

    page = _LINK.sub(inlined, _text(FLEET))
    policy = f"default-src 'none'; script-src {' '.join(hashes)}; style-src 'unsafe-inline'; base-uri 'none'"
    run = msgspec.json.encode(data).decode().replace("<", "\\u003c")
    head = (
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<script type="application/json" id="run">{run}</script>'
    )
    return page.replace("<head>", f"<head>{head}", 1)


def _text(name: str) -> str:
    return assets()[name].decode()


def _served(request: Request, name: str) -> Response:
    data = assets().get(name)
    if data is None:
        return Response("There is no such file here.", 404, HEADERS, "text/plain")
    tag = f'"{hashlib.sha256(data).hexdigest()[:32]}"'
    headers = {**HEADERS, "etag": tag}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    ending = name[name.rindex(".") :]
    return Response(data, headers=headers, media_type=TYPES[ending])


__all__ = ["FLEET", "HEADERS", "PLAYGROUND", "assets", "self_contained", "site_routes"]
