"""The address that a server is told to listen on is tried before anything is loaded."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import Any

import pytest

from wisp.api.process import Listen
from wisp.core.errors import ConfigError

HERE = (socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", 0))
ELSEWHERE = (socket.AF_INET, socket.SOCK_STREAM, 0, "", ("192.0.2.1", 0))  # an address for documents
UNKNOWN = (99, socket.SOCK_STREAM, 0, "", ("::1", 0))  # a family that no machine has


def resolve_to(monkeypatch: pytest.MonkeyPatch, found: Sequence[Any]) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: list(found))


@pytest.mark.parametrize("found", [[HERE], [UNKNOWN, HERE], [ELSEWHERE, HERE], [HERE, ELSEWHERE]])
def test_one_address_of_a_host_that_can_be_bound_is_enough(
    monkeypatch: pytest.MonkeyPatch, found: Sequence[Any]
) -> None:
    """Where IPv6 is switched off, localhost may still have ::1 among its addresses."""
    resolve_to(monkeypatch, found)
    Listen("localhost", 0).try_port()


def test_a_host_elsewhere_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve_to(monkeypatch, [ELSEWHERE])
    with pytest.raises(
        ConfigError, match=r"cannot listen on wisp\.example: it is no address of this machine"
    ):
        Listen("wisp.example", 0).try_port()


def test_a_port_that_is_taken_is_refused_whatever_other_addresses_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        resolve_to(monkeypatch, [HERE, (*HERE[:4], taken.getsockname())])
        with pytest.raises(ConfigError, match="it is taken"):
            Listen("localhost", taken.getsockname()[1]).try_port()
