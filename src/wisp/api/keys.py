"""API keys and their limits, from a TOML file that may change at run time, and from WISP_API_KEYS.

    [keys.alice]
    secret = "..."            # or: sha256 = "<hex digest of the secret>"
    sessions = 8              # limits; leave out for none
    requests_per_minute = 60
    tokens_per_minute = 20000
    admin = true              # may drain and scale replicas

Removing a table revokes its key at the next look at the file, a few seconds later. The secrets in
WISP_API_KEYS, separated by commas, are keys without limits that may do everything: `default`, `default-2` and so on.
Secrets are kept and compared as digests.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import tomllib
from collections.abc import Callable, Set
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote, unquote

import msgspec
from starlette.requests import Request

from wisp.core.errors import ConfigError, RequestError
from wisp.core.verify.admission import KeyLimits

log = logging.getLogger("wisp.keys")

_SHA256 = re.compile(r"[0-9a-f]{64}")
ANONYMOUS = "anonymous"
POLL_S = 2.0


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    secret: str = ""
    sha256: str = ""
    sessions: Annotated[int, msgspec.Meta(ge=0)] = 0
    requests_per_minute: Annotated[int, msgspec.Meta(ge=0)] = 0
    tokens_per_minute: Annotated[int, msgspec.Meta(ge=0)] = 0
    admin: bool = False


class Keyring:
    """Names and limits by secret. Empty: everyone is let in as `anonymous`."""

    def __init__(self, path: Path | None = None, secrets: str | None = None, router: str = "") -> None:
        """`secrets`, separated by commas, are from the environment; `path` is a file of keys.

        router: what the router of this replica shows, to speak for a key that it has checked (`on_behalf`).
        """
        self.path = path
        self.router = router
        self._admins: Set[str] = frozenset()
        self.limits: dict[str, KeyLimits] = {}
        self._fixed = _named(secrets or "")
        self._names: dict[str, str] = dict(self._fixed)
        self._stamp: tuple[int, int] | None = None
        if path is not None:
            self.reload()

    def __bool__(self) -> bool:
        return bool(self._names) or self.path is not None

    def reload(self) -> bool:
        """Read the file again if it changed. Raises ConfigError for a bad file, and then keeps the old keys."""
        if self.path is None:
            return False
        try:
            stat = self.path.stat()
            stamp = (stat.st_mtime_ns, stat.st_size)
            if stamp == self._stamp:
                return False
            document = tomllib.loads(self.path.read_text())
        except (OSError, ValueError, RecursionError) as error:  # tomllib raises all of these
            raise ConfigError(f"cannot read the API keys in {self.path}: {error}") from None
        names, limits, admins = _parse(document, self.path)
        self.replace(names, limits, admins)
        self._stamp = stamp
        return True

    def replace(
        self, names: dict[str, str], limits: dict[str, KeyLimits], admins: Set[str] = frozenset()
    ) -> None:
        """From now on there are these keys, and those of the environment. `names`: by `digest_of` their secrets."""
        self._names = self._fixed | names
        self.limits = limits
        self._admins = admins

    async def watch(self, changed: Callable[[], None] = lambda: None) -> None:
        """Read the file again whenever it changes, for ever, and then call `changed`. Trouble is logged once."""
        trouble = ""
        while True:
            await asyncio.sleep(POLL_S)
            try:
                if self.reload():
                    changed()
                    log.info("API keys read again")
                trouble = ""
            except ConfigError as error:
                if trouble != str(error):
                    log.error("%s; the old keys stay in force", error)
                trouble = str(error)

    def authorize(self, header: str | None) -> str:
        """The name of the key in an Authorization header. Raises RequestError(401)."""
        if (name := self.speaks_for(header)) is not None:
            return name
        if not self:
            return ANONYMOUS
        scheme, _, secret = (header or "").partition(" ")
        if scheme.lower() != "bearer" or not secret.strip():
            raise _unauthorized("no API key; send 'Authorization: Bearer KEY'")
        digest = digest_of(secret.strip())
        for known, name in self._names.items():
            if hmac.compare_digest(known, digest):
                return name
        raise _unauthorized("this API key is not known here")

    def caller(self, request: Request) -> str:
        """The name of a request's key. Raises RequestError(401)."""
        return self.authorize(request.headers.get("authorization"))

    def speaks_for(self, header: str | None) -> str | None:
        """The key that our router names in an Authorization header; None if it is not our router's."""
        token, _, name = (header or "").removeprefix("Bearer ").partition("/")
        if not self.router or not hmac.compare_digest(digest_of(token), digest_of(self.router)):
            return None
        return unquote(name)

    def is_admin(self, name: str) -> bool:
        """May this key manage replicas? Where there are no keys, everyone on this machine may."""
        return not self or name in self._admins or name in self._fixed.values()


def on_behalf(token: str, name: str) -> str:
    """The secret by which a router that holds `token` speaks for the key `name`."""
    return f"{token}/{quote(name, safe='')}"


def _named(secrets: str) -> dict[str, str]:
    """Names by digest: a key each, as prefixes are shared and turns are taken by key."""
    found = dict.fromkeys(
        digest_of(_sound(secret.strip())) for secret in secrets.split(",") if secret.strip()
    )
    return {digest: f"default-{n}" if n > 1 else "default" for n, digest in enumerate(found, 1)}


def _sound(secret: str) -> str:
    """Raises ConfigError for a secret that no client could send in a header."""
    if not secret.isascii() or not secret.isprintable() or secret != secret.strip():
        raise ConfigError(
            "API keys are of ASCII characters, without white space around them; set another one"
        )
    return secret


def digest_of(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _unauthorized(message: str) -> RequestError:
    return RequestError(401, message, code="invalid_api_key", type="authentication_error")


def _parse(document: dict[str, Any], path: Path) -> tuple[dict[str, str], dict[str, KeyLimits], set[str]]:
    names: dict[str, str] = {}
    admins: set[str] = set()
    limits: dict[str, KeyLimits] = {}
    tables = document.get("keys")
    if not isinstance(tables, dict):
        raise ConfigError(f"{path}: expected tables [keys.NAME], each with a secret or a sha256")
    for name, table in tables.items():
        try:
            entry = msgspec.convert(table, _Entry)
        except msgspec.ValidationError as error:
            raise ConfigError(f"{path}: [keys.{name}]: {error}") from None
        if not name.isprintable():
            raise ConfigError(f"{path}: {name!r} is no name for a key: it goes into logs")
        digest = entry.sha256.lower() or (digest_of(_sound(entry.secret)) if entry.secret else "")
        if not digest or digest in names or (entry.secret and entry.sha256):
            raise ConfigError(f"{path}: [keys.{name}] needs a secret or a sha256 of its own")
        if not _SHA256.fullmatch(digest):
            raise ConfigError(
                f"{path}: [keys.{name}]: sha256 is 64 hexadecimal digits, as `sha256sum` prints them"
            )
        names[digest] = name
        limits[name] = KeyLimits(entry.sessions, entry.requests_per_minute, entry.tokens_per_minute)
        if entry.admin:
            admins.add(name)
    return names, limits, admins
