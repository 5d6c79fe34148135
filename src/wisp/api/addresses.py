"""Fair shares of HTTP connections between addresses.

Descriptors are few, and a connection needs no key, so one address could hold them all. When all are taken, the address
with the most connections gives one up to an address that has at least two fewer. Idle connections go first, the longest
silent of them before the others. If the newcomer's own address has the most, it gives up an idle one of its own; if it
has none, the newcomer is refused. Behind a proxy all clients have one address, so there only idle connections go.
"""

from __future__ import annotations

import resource
from collections import Counter
from typing import Protocol

SHARE = 4  # a descriptor in so many is for HTTP: half of them are for sessions, and files need some


class Connection(Protocol):
    """What is shared. heard: when something last came over it. idle: no request is being answered over it."""

    @property
    def address(self) -> str: ...
    @property
    def heard(self) -> float: ...
    @property
    def idle(self) -> bool: ...
    def cut(self) -> None:
        """End it now."""


class Addresses:
    """The HTTP connections of a port, at `most` at a time (default: a quarter of the descriptors of this process)."""

    def __init__(self, most: int | None = None) -> None:
        self._most = most
        self._inside: dict[int, Connection] = {}

    def enter(self, connection: Connection) -> bool:
        """Count a new one, and end another where that takes its place. False: there is no place for it."""
        most = self._most or descriptors() // SHARE
        if len(self._inside) >= most and not self._make_room(connection):
            return False
        self._inside[id(connection)] = connection
        return True

    def leave(self, connection: Connection) -> None:
        """It has ended, or is no HTTP connection any more."""
        self._inside.pop(id(connection), None)

    def _make_room(self, newcomer: Connection) -> bool:
        has = Counter(c.address for c in self._inside.values())
        rich, most = max(has.items(), key=lambda item: (item[1], item[0]))
        fair = most <= has[newcomer.address] + 1
        owner = newcomer.address if fair else rich
        choice = [c for c in self._inside.values() if c.address == owner and (c.idle or not fair)]
        if not choice:
            return False
        gone = min(choice, key=lambda c: (not c.idle, c.heard))
        self.leave(gone)
        gone.cut()
        return True


def descriptors() -> int:
    """How many this process may have."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def raise_descriptors(most: int = 1 << 16) -> None:
    """Have as many descriptors as this process may give itself: the usual 1024 are for programs that poll all of them.

    Never lowers anything, and never fails.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = most if hard == resource.RLIM_INFINITY else min(hard, most)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
