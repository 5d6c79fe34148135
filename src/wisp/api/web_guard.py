"""Keeps web pages away from a process that asks for no key.

Any page in a visitor's browser can send requests to loopback. Two headers reveal such a page, and it cannot forge them:
`Host` is the name that the page used (its own, after DNS rebinding), and `Origin` is the page's origin. Where keys are
required, a page has none, so Host may be any name. A WebSocket of a foreign page is refused in any case, since browsers
open one without asking the server first.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from wisp.api.errors import error_response, request_id
from wisp.core.errors import ConfigError, RequestError

_NAME = re.compile(r"[a-z0-9_]([a-z0-9_.-]{0,251}[a-z0-9_])?")

_ORIGIN = re.compile(r"https?://[^/\s]+")


def is_loopback(host: str) -> bool:
    """Can only this machine reach what listens there?"""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def host_names(text: str) -> tuple[str, ...]:
    """The names in a list by comma, as `--allowed-hosts` has it. Raises ConfigError."""
    names = tuple(part.strip().lower().rstrip(".") for part in text.split(",") if part.strip())
    for name in names:
        if not (_NAME.fullmatch(name) or _is_address(name)):
            raise ConfigError(
                f"--allowed-hosts: {name!r} is no host name; give names such as wisp.example.com"
            )
    return names


def web_origins(text: str) -> tuple[str, ...]:
    """The origins in a list by comma, as `--cors-origins` has it. Raises ConfigError."""
    origins = tuple(part.strip().lower().rstrip("/") for part in text.split(",") if part.strip())
    for origin in origins:
        if origin != "*" and not _ORIGIN.fullmatch(origin):
            message = f"--cors-origins: {origin!r} is no origin; give some such as https://app.example.com"
            raise ConfigError(message)
    return origins


def cross_origin(app: ASGIApp, origins: Collection[str]) -> ASGIApp:
    """Tells browsers that pages from `origins` may use `app`. Cookies are none of it."""
    return CORSMiddleware(
        app,
        allow_origins=list(origins),
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        expose_headers=["x-request-id", "retry-after"],
    )


class WebGuard:
    """ASGI middleware in front of everything that a port serves."""

    def __init__(
        self, app: ASGIApp, *, keyed: bool, hosts: Collection[str] = (), origins: Collection[str] = ()
    ) -> None:
        """keyed: every caller has to show a key.

        hosts: names besides loopback's that `Host` may give; pages from there are not foreign.
        origins: other pages that are let in, as browsers write them: `https://app.example.com`.
        """
        self._app = app
        self._keyed = keyed
        self._hosts = frozenset(hosts)
        self._origins = frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        try:
            self._check(scope)
        except RequestError as error:
            await refuse(scope, receive, send, error)
            return
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        """Raises RequestError 403."""
        headers = {k: v.decode("latin-1") for k, v in scope["headers"] if k in (b"host", b"origin")}
        host, origin = headers.get(b"host"), headers.get(b"origin")
        # Without Host it is HTTP/1.0, which no browser speaks
        if not self._keyed and host is not None and not self._is_ours(_name(host)):
            message = (
                f"While it asks for no API key, this server answers to the names of loopback, not to {host!r}; "
                "allow the name with --allowed-hosts, or set API keys."
            )
            raise RequestError(403, message, code="host_not_allowed", type="permission_error")
        if origin is None or (self._keyed and scope["type"] == "http"):
            return
        if not self._is_at_home(origin, host or ""):
            message = f"Pages from {origin!r} may not use this server."
            raise RequestError(403, message, code="origin_not_allowed", type="permission_error")

    def _is_ours(self, name: str) -> bool:
        return is_loopback(name) or name in self._hosts

    def _is_at_home(self, origin: str, host: str) -> bool:
        """Is the page one that this very port has served, or one that was allowed?"""
        try:
            parts = urlsplit(origin.lower())
            name = parts.hostname
        except ValueError:
            return False
        own = bool(name) and (parts.netloc == host.lower() or name in self._hosts)
        return own or origin.lower() in self._origins or "*" in self._origins


async def refuse(scope: Scope, receive: Receive, send: Send, error: RequestError) -> None:
    """Answer a request, or a WebSocket's upgrade, with `error`."""
    response = error_response(error, request_id(Request({**scope, "type": "http"})))
    if scope["type"] == "websocket":
        await receive()  # websocket.connect
        if "websocket.http.response" not in scope.get("extensions", {}):
            await send({"type": "websocket.close", "code": 4000 + error.status, "reason": str(error)[:100]})
            return
    await response(scope, receive, send)


def _name(host: str) -> str:
    """The name or address in a Host header, without its port."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return (host if _is_address(host) else host.partition(":")[0]).rstrip(".")


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
