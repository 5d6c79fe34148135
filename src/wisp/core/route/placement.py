"""Placement: the replica for a session. Decisions only, without I/O or clock.

A session goes to the replica that has the longest prefix of its prompt cached, unless that replica already has more
than its share of the sessions. Then it goes to the least loaded one. Load is sessions per KV slot: those last
reported, and those placed since.

The router does not ask replicas for their cached prefixes. It remembers the prompts placed on each, least recently used
forgotten first, as hashes of blocks. Each hash covers the blocks before it, API key and salt: prefixes are shared only
within one key and salt (`core.verify.kv`).
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict, deque
from collections.abc import Sequence
from enum import Enum

import msgspec

from wisp.core.verify.admission import Refusal

BLOCK = 16  # tokens; a shorter prefix is not copied either (`kv.COPY_FROM`)
UNFAIR = 1.2  # multiple of its share of the sessions up to which a replica is preferred for a cached prefix
SETTLE_S = 0.2  # a report may lack sessions that were placed this long before it
# Sessions whose replica is remembered, for their return: of each place that there is, and in all (20 MB). Only open
# ones can return, and one that is forgotten is placed by its prefix, which is where it was.
REMEMBERED_A_PLACE, REMEMBERED = 4, 100_000


class Reason(Enum):
    """Reason for a choice. Values are labels of a metric."""

    RESUME = "resume"  # the session was there before
    PREFIX = "prefix"  # a prefix of its prompt is cached there
    LOAD = "room"  # least loaded


class ReplicaSize(msgspec.Struct, frozen=True):
    """The size of a replica."""

    slots: int
    kv_tokens: int
    max_sessions: int


class Choice(msgspec.Struct, frozen=True):
    """The replica for a session. `shared`: tokens of the prompt that should be cached there."""

    replica: str
    reason: Reason
    shared: int


class _Replica:
    """A replica as the router sees it. `blocks`: hashes of cached blocks, least recently used first."""

    def __init__(self, size: ReplicaSize) -> None:
        self.size = size
        self.open = True
        self.late = False  # its next report is overdue
        self.reported = 0
        self.since: deque[float] = deque()  # times of placements that no report includes yet
        self.placed = 0
        self.blocks: OrderedDict[bytes, None] = OrderedDict()

    @property
    def sessions(self) -> int:
        return self.reported + len(self.since)

    def shared(self, blocks: Sequence[bytes]) -> int:
        """Number of leading blocks that are cached."""
        for n, block in enumerate(blocks):
            if block not in self.blocks:
                return n
        return len(blocks)

    def take(self, now: float, blocks: Sequence[bytes]) -> None:
        self.since.append(now)
        self.placed += 1
        # A block is of no use without those before it, so these are forgotten later
        for block in reversed(blocks):
            self.blocks[block] = None
            self.blocks.move_to_end(block)
        while len(self.blocks) > self.size.kv_tokens // BLOCK:
            self.blocks.popitem(last=False)


class Placement:
    """Replicas by name. Times are seconds and never go back."""

    def __init__(self) -> None:
        self._replicas: dict[str, _Replica] = {}
        self._where: dict[str, OrderedDict[str, str]] = {}  # by key: session -> replica, oldest first
        self._remembered = 0
        self._places = 0  # of all replicas together, when they were most

    def up(self, replica: str, size: ReplicaSize) -> None:
        """A replica has started. Its cache is empty."""
        self._replicas[replica] = _Replica(size)
        self._places = max(self._places, sum(r.size.max_sessions for r in self._replicas.values()))

    def reported(self, now: float, replica: str, sessions: int) -> None:
        """A replica reported at `now` that it serves `sessions`."""
        known = self._replicas.get(replica)
        if known is not None:
            known.reported = sessions
            known.late = False
            while known.since and known.since[0] < now - SETTLE_S:
                known.since.popleft()

    def late(self, replica: str) -> None:
        """A report is overdue: until it comes, other replicas are preferred."""
        if replica in self._replicas:
            self._replicas[replica].late = True

    def shut(self, replica: str, *, shut: bool = True) -> None:
        """Place no more sessions there (it drains, or is silent). `shut=False`: place them again."""
        if replica in self._replicas:
            self._replicas[replica].open = not shut

    def gone(self, replica: str) -> None:
        """A replica has ended. Its cache is lost."""
        self._replicas.pop(replica, None)

    @property
    def any_open(self) -> bool:
        return any(r.open for r in self._replicas.values())

    def sessions(self, replica: str) -> int:
        """Number of sessions on a replica: reported, and placed since."""
        known = self._replicas.get(replica)
        return known.sessions if known else 0

    def knows(self, key: str, session: str) -> bool:
        """Was this session of `key` placed before?"""
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
        """The replica for `session`.

        avoid: a replica that the edge could not use. owed: `key` may take a place from another key
        (`core.verify.places`), so a full replica will do.
        Raises Refusal("overloaded") if every replica is full, or there is none.
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
        """Remember a placement. Beyond what is remembered, the key with most of them loses its oldest."""
        own = self._where.setdefault(key, OrderedDict())
        self._remembered += session not in own
        own[session] = replica
        own.move_to_end(session)
        if self._remembered > min(REMEMBERED_A_PLACE * self._places, REMEMBERED):
            max(self._where.values(), key=len).popitem(last=False)
            self._remembered -= 1


def _choose(fit: dict[str, _Replica], blocks: Sequence[bytes]) -> tuple[str, Reason]:
    shared = {name: r.shared(blocks) for name, r in fit.items()}
    most = max(shared.values())
    # Least loaded first, then least used; by name at last, for a total order
    order = sorted(fit, key=lambda n: (fit[n].sessions / fit[n].size.slots, fit[n].placed, n))
    best = next(name for name in order if shared[name] == most)
    if most and _fair(best, fit):
        return best, Reason.PREFIX
    return order[0], Reason.LOAD


def _fair(name: str, fit: dict[str, _Replica]) -> bool:
    """With one more session, would `name` have at most 20 %, or one session, more than its share?"""
    total = 1 + sum(r.sessions for r in fit.values())
    share = total * fit[name].size.slots / sum(r.size.slots for r in fit.values())
    return fit[name].sessions + 1 <= max(UNFAIR * share, share + 1)


def block_hashes(key: str, salt: str, prompt: Sequence[int]) -> list[bytes]:
    """One hash for each full block of `prompt`. It covers API key, salt, the block, and all blocks before."""
    hashes = []
    sharers = f"{salt} {key}"  # a salt contains no blanks
    so_far = hashlib.blake2b(sharers.encode(), digest_size=12).digest()
    for start in range(0, len(prompt) - BLOCK + 1, BLOCK):
        data = so_far + array("q", prompt[start : start + BLOCK]).tobytes()
        so_far = hashlib.blake2b(data, digest_size=12).digest()
        hashes.append(so_far)
    return hashes
