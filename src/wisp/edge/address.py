"""Addresses of servers, checked at the start, so that a misspelt one is an error at once."""

from __future__ import annotations

import ipaddress
import re
from urllib.parse import SplitResult, urlsplit, urlunsplit

from wisp.api.paths import SESSION_PATH
from wisp.core.errors import ConfigError, ProtocolError

_SCHEMES = {"http": "ws", "https": "wss", "ws": "ws", "wss": "wss"}
_LABEL = re.compile(r"[A-Za-z0-9_-]{1,63}")
_LONGEST_HOST = 253  # characters, by the rules of DNS
_REDIRECT = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]*):[0-9]{1,5}")


def session_url(server: str) -> str:
    """The session WebSocket of a server given as URL or HOST:PORT. Raises ConfigError if it is no address."""
    given = server.strip()
    try:
        if any(c.isspace() or not c.isprintable() for c in given):
            raise ValueError("there is a blank in it")
        parts = urlsplit(given if "://" in given else f"http://{given}")
        if parts.scheme not in _SCHEMES:
            raise ValueError(f"{parts.scheme}:// is not spoken here")
        if "@" in parts.netloc:
            raise ValueError("a name or password has no place in it; the key is taken from WISP_API_KEY")
        if parts.query or parts.fragment:
            raise ValueError("nothing may follow its path")
        netloc = _host(parts) + _port(parts)
    except ValueError as error:  # UnicodeError is one
        raise ConfigError(f"{server!r} is not an address such as http://127.0.0.1:8100: {error}") from None
    path = parts.path.rstrip("/").removesuffix(SESSION_PATH).removesuffix("/v1") + SESSION_PATH
    return urlunsplit((_SCHEMES[parts.scheme], netloc, path, "", ""))


def http_url(server: str, path: str) -> str:
    """The HTTP address of `path` on the same server. Raises ConfigError."""
    parts = urlsplit(session_url(server))
    scheme = "https" if parts.scheme == "wss" else "http"
    return urlunsplit((scheme, parts.netloc, parts.path.removesuffix(SESSION_PATH) + path, "", ""))


def redirected_url(url: str, address: str) -> str:
    """The session socket at another host and port, by the same scheme. Raises ProtocolError if `address` is none."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    own = f"[{host}]" if ":" in host else host
    netloc = own + address if address[:1] == ":" else address
    try:
        if not _REDIRECT.fullmatch(address):
            raise ConfigError("it is not HOST:PORT")
        return session_url(f"{parts.scheme}://{netloc}")
    except ConfigError:
        message = f"the router redirected to {address!r}, which is not HOST:PORT"
        raise ProtocolError("malformed", message) from None


def is_local(url: str) -> bool:
    """Is it on this machine? Then no proxy from the environment is used."""
    host = urlsplit(url).hostname or ""
    return host in ("localhost", "::1") or host.startswith("127.")


def _host(parts: SplitResult) -> str:
    """The host as it goes into a URL. Raises ValueError."""
    host = parts.hostname
    if not host:
        raise ValueError("the host is missing")
    if ":" in host:
        return f"[{ipaddress.IPv6Address(host)}]"
    try:
        host = host.encode("idna").decode()
    except UnicodeError:
        raise ValueError(f"{host[:80]!r} is not a host's name") from None
    labels = host.removesuffix(".").split(".")
    if len(host) > _LONGEST_HOST or not all(map(_LABEL.fullmatch, labels)):
        raise ValueError(f"{host[:80]!r} is not a host's name")
    return host


def _port(parts: SplitResult) -> str:
    """ ":PORT", or nothing where none is given. Raises ValueError."""
    _, colon, digits = parts.netloc.rpartition("]")[2].partition(":")
    if not colon:
        return ""
    if not (digits.isascii() and digits.isdecimal() and 1 <= int(digits[:6]) <= 65535):
        raise ValueError(f"{digits[:20]!r} is not a port from 1 to 65535")
    return f":{int(digits)}"
