"""Which replica gets a session: the one that has its prompt's beginning cached, as long as that is fair, else the
one with most room. Decisions only: told of replicas and time, it answers with a replica.

What a replica has cached is not asked but remembered: a prompt that was placed there has left its KV there, and
the longest ago goes first when there is no more room. Prompts are remembered as hashes of their blocks, each of which
covers all before it, and begins with API key and salt: prefixes are shared only within one of these (`core.verify.kv`).

Load is sessions per KV slot. It counts what a replica last reported and what was placed on it since.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict, deque
from collections.abc import Sequence
from enum import Enum

import msgspec

from wisp.core.verify.admission import Refusal

BLOCK = 16  # tokens; shorter prefixes are not worth a copy either (`kv.COPY_FROM`)
UNFAIR = 1.2  # a prefix draws a session to a replica only up to this multiple of its share of the sessions
SETTLE_S = 0.2  # a session placed this long before a report may not be in it yet
REMEMBERED = 100_000  # sessions whose replica is known, for those that come back: 20 MB


class Reason(Enum):
    """Why a session went where it went."""

    RESUME = "resume"  # it was there before
    PREFIX = "prefix"
    ROOM = "room"


class ReplicaSize(msgspec.Struct, frozen=True):
    """What a replica holds."""

    slots: int
    kv_tokens: int
    max_sessions: int


class Choice(msgspec.Struct, frozen=True):
    """`shared`: tokens of the prompt that the replica is thought to have cached."""

    replica: str
    reason: Reason
    shared: int


class _Replica:
    """What is known of one. `blocks` is in order of last use."""

    def __init__(self, size: ReplicaSize) -> None:
        self.size = size
        self.open = True
        self.late = False  # with its next report
        self.reported = 0
        self.since: deque[float] = deque()  # when those were placed that no report counts yet
        self.placed = 0
        self.blocks: OrderedDict[bytes, None] = OrderedDict()

    @property
    def sessions(self) -> int:
        return self.reported + len(self.since)

    def shared(self, blocks: Sequence[bytes]) -> int:
        """How many blocks, from the first on, it has."""
        for n, block in enumerate(blocks):
            if block not in self.blocks:
                return n
        return len(blocks)

    def take(self, now: float, blocks: Sequence[bytes]) -> None:
        self.since.append(now)
        self.placed += 1
        for block in reversed(blocks):  # a block is of use only with all before it: those go last
            self.blocks[block] = None
            self.blocks.move_to_end(block)
        while len(self.blocks) > self.size.kv_tokens // BLOCK:
            self.blocks.popitem(last=False)


class Placement:
    """Replicas by name. Times are seconds and never go back."""

    def __init__(self) -> None:
        self._replicas: dict[str, _Replica] = {}
        self._where: dict[str, OrderedDict[str, str]] = {}  # by key: session -> replica, longest ago first
        self._remembered = 0

    def up(self, replica: str, size: ReplicaSize) -> None:
        """A replica has started, with nothing cached."""
        self._replicas[replica] = _Replica(size)

    def reported(self, now: float, replica: str, sessions: int) -> None:
        """A replica said at `now` how many sessions it serves."""
        known = self._replicas.get(replica)
        if known is not None:
            known.reported = sessions
            known.late = False
            while known.since and known.since[0] < now - SETTLE_S:
                known.since.popleft()

    def late(self, replica: str) -> None:
        """Its report has not come when it should: others are preferred until it does."""
        if replica in self._replicas:
            self._replicas[replica].late = True

    def shut(self, replica: str, *, shut: bool = True) -> None:
        """Nothing more goes there (it is drained, or silent), or again."""
        if replica in self._replicas:
            self._replicas[replica].open = not shut

    def gone(self, replica: str) -> None:
        """It has ended, and its cache with it."""
        self._replicas.pop(replica, None)

    @property
    def any_open(self) -> bool:
        """Is there a replica at all?"""
        return any(r.open for r in self._replicas.values())

    def sessions(self, replica: str) -> int:
        """How many sessions it is thought to serve."""
        known = self._replicas.get(replica)
        return known.sessions if known else 0

    def knows(self, key: str, session: str) -> bool:
        """Was this session of that key placed before?"""
        return session in self._where.get(key, ())

    def place(
        self,
        now: float,
        session: str,
        key: str,
        prompt: Sequence[int],
        avoid: str = "",
        *,
        salt: str = "",
        owed: bool = False,
    ) -> Choice:
        """Where `session` goes. `avoid` is a replica that did not do. `owed`: another key has places that this one
        may have (`core.verify.places`), so that a replica will do that is full.

        Raises Refusal("overloaded") where every replica is full, or there is none.
        """
        fit = {
            n: r for n, r in self._replicas.items() if r.open and (owed or r.sessions < r.size.max_sessions)
        }
        if len(fit) > 1:
            fit.pop(avoid, None)
        fit = {n: r for n, r in fit.items() if not r.late} or fit
        if not fit:
            most = sum(r.size.max_sessions for r in self._replicas.values() if r.open)
            raise Refusal("overloaded", f"all {most} sessions of these verifiers are in use", 1.0)
        blocks = block_hashes(key, salt, prompt)
        was = self._where[key].get(session) if key in self._where else None
        if was is not None and was in fit:
            name, reason = was, Reason.RESUME
        else:
            name, reason = _choose(fit, blocks)
        shared = fit[name].shared(blocks) * BLOCK
        fit[name].take(now, blocks)
        self._remember(key, session, name)
        return Choice(name, reason, shared)

    def _remember(self, key: str, session: str, replica: str) -> None:
        """Of the key that has most of them, the one placed longest ago is forgotten."""
        own = self._where.setdefault(key, OrderedDict())
        self._remembered += session not in own
        own[session] = replica
        own.move_to_end(session)
        if self._remembered > REMEMBERED:
            max(self._where.values(), key=len).popitem(last=False)
            self._remembered -= 1


def _choose(fit: dict[str, _Replica], blocks: Sequence[bytes]) -> tuple[str, Reason]:
    shared = {name: r.shared(blocks) for name, r in fit.items()}
    most = max(shared.values())
    # Least loaded first; where all are alike, the least used; then by name, so that it is one order
    order = sorted(fit, key=lambda n: (fit[n].sessions / fit[n].size.slots, fit[n].placed, n))
    best = next(name for name in order if shared[name] == most)
    if most and _fair(best, fit):
        return best, Reason.PREFIX
    return order[0], Reason.ROOM


def _fair(name: str, fit: dict[str, _Replica]) -> bool:
    """Would it, with one session more, still have about its share: 20 %, or one session, above it at most?"""
    total = 1 + sum(r.sessions for r in fit.values())
    share = total * fit[name].size.slots / sum(r.size.slots for r in fit.values())
    return fit[name].sessions + 1 <= max(UNFAIR * share, share + 1)


def block_hashes(key: str, salt: str, prompt: Sequence[int]) -> list[bytes]:
    """One hash for each full block of `prompt`: of key and salt, the block, and all before it."""
    hashes = []
    sharers = f"{salt} {key}"  # a salt has no blanks
    so_far = hashlib.blake2b(sharers.encode(), digest_size=12).digest()
    for start in range(0, len(prompt) - BLOCK + 1, BLOCK):
        data = so_far + array("q", prompt[start : start + BLOCK]).tobytes()
        so_far = hashlib.blake2b(data, digest_size=12).digest()
        hashes.append(so_far)
    return hashes
