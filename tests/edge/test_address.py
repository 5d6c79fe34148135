"""Addresses of servers: what is one, and what is refused before anything is connected."""

from __future__ import annotations

import pytest

from wisp.core.errors import ConfigError, ProtocolError
from wisp.edge.address import http_url, redirected_url, session_url


@pytest.mark.parametrize(
    ("server", "url"),
    [
        ("http://h:1", "ws://h:1/v1/sessions"),
        ("https://h/", "wss://h/v1/sessions"),
        ("h:8100", "ws://h:8100/v1/sessions"),
        (" http://127.0.0.1:8100\n", "ws://127.0.0.1:8100/v1/sessions"),
        ("https://h/wisp/v1", "wss://h/wisp/v1/sessions"),
        ("ws://h:1/v1/sessions", "ws://h:1/v1/sessions"),
        ("[::1]:8100", "ws://[::1]:8100/v1/sessions"),
        ("http://my_box.lan.:80", "ws://my_box.lan.:80/v1/sessions"),
        ("http://bücher.example", "ws://xn--bcher-kva.example/v1/sessions"),
    ],
)
def test_addresses_that_are_accepted(server: str, url: str) -> None:
    assert session_url(server) == url
    assert session_url(url) == url
    assert http_url(server, "/v1/x") == url.replace("ws", "http", 1).replace("/v1/sessions", "/v1/x")


@pytest.mark.parametrize(
    ("server", "why"),
    [
        ("", "host is missing"),
        ("http://", "host is missing"),
        (":8100", "host is missing"),
        ("ftp://h", "not spoken here"),
        ("http://127.0.0.1:99999", "port from 1 to 65535"),
        ("http://127.0.0.1:0", "port from 1 to 65535"),
        ("http://127.0.0.1:abc", "port from 1 to 65535"),
        ("http://127.0.0.1:-1", "port from 1 to 65535"),
        ("http://127.0.0.1:8100 --draft none", "a blank"),
        ("http://127.0.0.1\t:8100", "a blank"),
        ("http://" + "a" * 64 + ":8100", "not a host's name"),
        ("http://" + ".".join(["a" * 63] * 4) + ".aa", "not a host's name"),
        ("http://a..b", "not a host's name"),
        ("http://ü" + "a" * 63, "not a host's name"),
        ("http://a$b", "not a host's name"),
        ("http://[::1", "IPv6"),
        ("http://[::z]:1", "is not an address"),
        ("http://me:secret@h:1", "WISP_API_KEY"),
        ("http://h:1/?key=1", "nothing may follow"),
    ],
)
def test_other_addresses_are_refused_at_once(server: str, why: str) -> None:
    with pytest.raises(ConfigError, match="is not an address") as error:
        session_url(server)
    assert why in str(error.value)


@pytest.mark.parametrize(
    ("server", "address", "url"),
    [
        ("http://h:8100", ":8101", "ws://h:8101/v1/sessions"),
        ("http://h:8100/proxied/v1", ":8101", "ws://h:8101/v1/sessions"),
        ("https://h", "10.0.0.7:8101", "wss://10.0.0.7:8101/v1/sessions"),
        ("http://[::1]:8100", ":8101", "ws://[::1]:8101/v1/sessions"),
        ("http://h:8100", "[fd00::7]:8101", "ws://[fd00::7]:8101/v1/sessions"),
    ],
)
def test_redirects_keep_scheme_and_where_none_is_given_host(server: str, address: str, url: str) -> None:
    assert redirected_url(session_url(server), address) == url


@pytest.mark.parametrize(
    "address",
    ["", "h", "h:", ":x", "http://h:1", "h:1/x", "u@h:1", ":123456", "h :1", ":99999", ":0", "a..b:1"],
)
def test_a_redirect_to_no_address_is_not_followed(address: str) -> None:
    with pytest.raises(ProtocolError, match="HOST:PORT"):
        redirected_url("ws://h/v1/sessions", address)
