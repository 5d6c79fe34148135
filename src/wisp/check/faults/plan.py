"""The plan of a run: the shape of the system, and a list of events, drawn from one seed or read from a file.

An event names what happens and carries a few numbers, which are read when it happens: "the process number `pick` of
those that are there then". So any part of the list is a run, too, and a list that fails can be made shorter.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from wisp.core.verify.admission import KeyLimits

STORM_S = 25.0
KEYS = ("ann", "ben", "cat")
DRAFTERS = ("fixed:4", "fixed:8", "gain", "confidence:0.5", "predictor", "")


class Fault(NamedTuple):
    """A kind of fault, with its relative frequency."""

    weight: int
    about: str


FAULTS = {
    "cut": Fault(10, "a connection breaks; each end notices when it does"),
    "drain_line": Fault(4, "a client is gone, what it sent is still read"),
    "stall": Fault(6, "a connection is a black hole for a while, one way or both"),
    "part": Fault(3, "nothing passes between two hosts for a while"),
    "slow": Fault(1, "everything takes longer on the network for a while"),
    "proxy": Fault(1, "something else answers new connections for a while"),
    "old_server": Fault(1, "a server of the previous release answers new connections for a while"),
    "kill": Fault(4, "a process is gone"),
    "vanish": Fault(2, "a process is gone, with its machine"),
    "freeze": Fault(4, "a process does nothing for a while"),
    "stop": Fault(2, "SIGTERM"),
    "swap": Fault(1, "a process is started again with other weights under the same name"),
    "step": Fault(6, "an engine's step fails"),
    "slice": Fault(3, "one session's share of a step fails"),
    "nan": Fault(1, "a session's logits are no numbers"),
    "late": Fault(3, "a step takes seconds"),
    "hang": Fault(1, "a step never ends"),
    "dead": Fault(1, "the engine is dead"),
    "drafter": Fault(4, "a drafter fails for a few calls"),
    "edge": Fault(5, "an edge's process is killed, and started again"),
    "revoke": Fault(1, "a key is revoked for a while"),
    "limit": Fault(2, "the limits of a key change"),
    "operate": Fault(4, "replicas are drained, restarted, scaled"),
    "leave": Fault(6, "a user goes away in mid-answer"),
    "halt": Fault(2, "a user reads nothing for a while"),
    "old": Fault(2, "a peer of the previous release"),
    "hostile": Fault(14, "a peer with a valid key sends nonsense"),
}


class Shape(msgspec.Struct, frozen=True):
    """The system. Tokens and seconds. `replicas` 0: verifiers alone, each the home of some edges.

    balanced: edges have one address for all verifiers, and each connection leads to any of them
    edges: (key, drafting policy; "" for none) of each
    sockets: most session sockets of a server
    """

    replicas: int
    verifiers: int
    edges: tuple[tuple[str, str], ...]
    batching: str
    slots: int
    slot_tokens: int
    kv_tokens: int
    step_tokens: int
    max_sessions: int
    park_s: float
    drain_s: float
    give_up_s: float
    sockets: int
    slo_admission: bool
    limits: dict[str, KeyLimits]
    balanced: bool = False
    depth: int = 1
    history_tokens: int = 0


class Event(msgspec.Struct, frozen=True, array_like=True):
    """At `at` seconds, `what` happens to number `pick`; `more` and `x` (0 to 1) say how."""

    at: float
    what: str
    pick: int = 0
    more: int = 0
    x: float = 0.0


class Plan(msgspec.Struct, frozen=True):
    """A run. The seed also decides all delays."""

    seed: int
    shape: Shape
    events: list[Event]


def shape_of(rng: random.Random) -> Shape:
    """A system by chance: small, so that little is enough to fill it."""
    fleet = rng.random() < 0.6
    slots = rng.randint(2, 6)
    slot_tokens = rng.choice((96, 128))
    keys = KEYS[: rng.randint(2, 3)]
    edges = tuple((rng.choice(keys), rng.choice(DRAFTERS)) for _ in range(rng.randint(3, 12)))
    limits = {key: KeyLimits() for key in keys}
    if rng.random() < 0.3:
        limits[keys[0]] = KeyLimits(sessions=rng.randint(2, 6), requests_per_minute=rng.choice((0, 120)))
    verifiers = 0 if fleet else rng.randint(1, 3)
    return Shape(
        replicas=rng.randint(2, 4) if fleet else 0,
        verifiers=verifiers,
        edges=edges,
        batching=rng.choice(("wisp", "wisp", "wisp", "continuous", "fcfs", "paper", "wisp:keep")),
        slots=slots,
        slot_tokens=slot_tokens,
        kv_tokens=max(slot_tokens, int(slots * slot_tokens * rng.choice((0.25, 0.5, 1.0)))),
        step_tokens=rng.choice((12, 32, 96)),
        max_sessions=rng.choice((4, 8, 64)),
        park_s=rng.choice((1.0, 3.0)),
        drain_s=rng.choice((0.5, 2.0)),
        give_up_s=rng.choice((8.0, 20.0)),
        sockets=rng.choice((4, 64, 64)),
        slo_admission=rng.random() < 0.5,
        limits=limits,
        balanced=verifiers > 1 and rng.random() < 0.7,
    )


def plan_of(seed: int, faults: int = 100) -> Plan:
    """A run by chance."""
    rng = random.Random(f"plan {seed}")
    shape = msgspec.structs.replace(
        shape_of(rng),
        depth=random.Random(f"depth {seed}").randint(1, 2),
        history_tokens=random.Random(f"history {seed}").choice((0, 300, 1 << 14)),
    )
    swarm = _swarm(rng)
    events = [
        Event(
            round(rng.uniform(0.3, STORM_S), 4),
            rng.choices(list(swarm), list(swarm.values()))[0],
            rng.getrandbits(30),
            rng.getrandbits(30),
            round(rng.random(), 4),
        )
        for _ in range(faults)
    ]
    asks = rng.randint(30, 90)
    events += [
        Event(round(rng.uniform(0.0, STORM_S), 4), "ask", rng.getrandbits(30), rng.getrandbits(30))
        for _ in range(asks)
    ]
    return Plan(seed, shape, sorted(events, key=lambda e: (e.at, e.what, e.pick)))


def _swarm(rng: random.Random) -> dict[str, float]:
    """Some kinds of faults are left out of each run: what needs calm beside it is found, too."""
    kept = {
        what: fault.weight * rng.choice((0.3, 1.0, 3.0))
        for what, fault in FAULTS.items()
        if rng.random() < 0.7
    }
    return kept or dict.fromkeys(FAULTS, 1.0)


def with_events(plan: Plan, events: Sequence[Event]) -> Plan:
    """The same system, with these events alone."""
    return Plan(plan.seed, plan.shape, list(events))
