"""Web pages and ports of loopback: who may come in by which name."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest
from starlette.types import Message, Receive, Scope, Send

from wisp.api.process import Listen, uvicorn_config
from wisp.api.web_guard import WebGuard, host_names
from wisp.core.errors import ConfigError


async def welcome(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "let in"})


def visit(
    guard: Any, host: str | None, origin: str | None = None, *, kind: str = "http"
) -> tuple[int, dict[str, Any]]:
    """(status, error): 200 for who was let in."""
    headers = [(b"host", host.encode())] if host is not None else []
    headers += [(b"origin", origin.encode())] if origin is not None else []
    scope: dict[str, Any] = {"type": kind, "headers": headers, "method": "GET", "path": "/v1/models"}
    scope["extensions"] = {"websocket.http.response": {}}
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    async def send(message: Message) -> None:
        sent.append(message)

    asyncio.run(guard(scope, receive, send))
    if sent[0]["type"] == "let in":
        return 200, {}
    prefix = "websocket.http" if kind == "websocket" else "http"
    assert [m["type"] for m in sent] == [f"{prefix}.response.start", f"{prefix}.response.body"]
    return sent[0]["status"], msgspec.json.decode(sent[1]["body"])["error"]


OPEN = WebGuard(welcome, keyed=False)
KEYED = WebGuard(welcome, keyed=True)
KINDS = pytest.mark.parametrize("kind", ["http", "websocket"])


@KINDS
@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:8100", "localhost.:8100", "127.0.0.1:8100", "127.8.9.1", "[::1]:8100", None]
)  # fmt: skip
def test_without_keys_loopback_is_answered_by_its_own_names(host: str | None, kind: str) -> None:
    assert visit(OPEN, host, kind=kind) == (200, {})


@KINDS
@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8100", "localhost.evil.example", "127.0.0.1.evil.example", "10.0.0.1:8100",
             "0.0.0.0:8100", "[::2]:8100", "", "[", "::", "@localhost"]
)  # fmt: skip
def test_without_keys_another_name_is_a_page_whose_name_was_rebound(host: str, kind: str) -> None:
    status, error = visit(OPEN, host, kind=kind)
    assert (status, error["code"]) == (403, "host_not_allowed")
    assert "--allowed-hosts" in error["message"]


@KINDS
@pytest.mark.parametrize(
    "origin", ["https://evil.example", "http://localhost:3000", "http://127.0.0.1", "null", "", "http://[", "file://",
               "http://evil.example@127.0.0.1:8100", "chrome-extension://abc"]
)  # fmt: skip
def test_without_keys_pages_from_elsewhere_are_kept_out(origin: str, kind: str) -> None:
    status, error = visit(OPEN, "127.0.0.1:8100", origin, kind=kind)
    assert (status, error["code"]) == (403, "origin_not_allowed")


@KINDS
def test_the_own_pages_and_programs_are_let_in(kind: str) -> None:
    assert visit(OPEN, "127.0.0.1:8100", "http://127.0.0.1:8100", kind=kind)[0] == 200
    assert visit(OPEN, "Localhost:8100", "http://localhost:8100", kind=kind)[0] == 200


@KINDS
def test_a_proxy_on_this_machine_may_serve_under_a_name_that_was_allowed(kind: str) -> None:
    guard = WebGuard(welcome, keyed=False, hosts=host_names(" wisp.example.com,Box.local. "))
    assert visit(guard, "wisp.example.com", "https://wisp.example.com", kind=kind)[0] == 200
    assert visit(guard, "box.local:443", kind=kind)[0] == 200
    # nginx's $host leaves the port out
    assert visit(guard, "wisp.example.com", "https://wisp.example.com:8443", kind=kind)[0] == 200
    assert visit(guard, "wisp.example.com", "https://evil.example", kind=kind)[0] == 403
    assert visit(guard, "other.example.com", kind=kind)[0] == 403


@KINDS
def test_a_page_of_the_list_is_let_in(kind: str) -> None:
    guard = WebGuard(welcome, keyed=False, origins=["https://app.example.com"])
    assert visit(guard, "127.0.0.1:8100", "https://app.example.com", kind=kind)[0] == 200
    assert visit(guard, "127.0.0.1:8100", "https://app.example.com:444", kind=kind)[0] == 403


def test_where_keys_are_asked_for_any_name_will_do_and_only_websockets_of_pages_are_kept_out() -> None:
    assert visit(KEYED, "wisp.example.com", kind="websocket")[0] == 200
    assert visit(KEYED, "wisp.example.com", "https://elsewhere.example")[0] == 200
    assert visit(KEYED, "wisp.example.com", "https://elsewhere.example", kind="websocket")[0] == 403


@pytest.mark.parametrize("names", ["http://wisp.example.com", "wisp.example.com:80/", "a b", "*", "-x"])
def test_malformed_names_are_refused_at_start(names: str) -> None:
    with pytest.raises(ConfigError, match="allowed-hosts"):
        host_names(names)


def test_every_port_has_the_guard_and_the_asked_for_keep_alive() -> None:
    config = uvicorn_config(welcome, Listen(), keyed=False)
    assert visit(config.app, "evil.example")[0] == 403
    assert config.timeout_keep_alive == 75.0
    config = uvicorn_config(welcome, Listen(allowed_hosts=("evil.example",), keep_alive_s=7.5), keyed=False)
    assert visit(config.app, "evil.example")[0] == 200
    assert config.timeout_keep_alive == 7.5
    # A replica of a router without keys, at this machine's address on a cluster
    config = uvicorn_config(welcome, Listen(host="10.0.0.7"), keyed=False)
    assert visit(config.app, "10.0.0.7:8101")[0] == 200
