"""The states of a session on the verifier, and the transitions between them: a table.

    READY --picked--> RUNNING --verdict--> WAITING --draft--> READY ...
                              |                    `-picked-> RUNNING  (decoded while its edge drafts)
                              `--more----> READY   (rest of a prompt, server mode, a draft already here)

READY means "can run"; a READY session may still have no KV slot. A RUNNING one has a slice in a step in flight, or in
several (`in_flight`). When its edge is lost a session is PARKED, or ORPHANED until the end of its steps; the edge
resumes it with an Open. A session cancelled during its steps is DOOMED: it ends with the last of them.
"""

from __future__ import annotations

from enum import Enum, auto


class State(Enum):
    """The state of a session."""

    READY = auto()  # can run
    RUNNING = auto()  # takes part in a step in flight
    WAITING = auto()  # for its edge
    PARKED = auto()  # edge lost
    ORPHANED = auto()  # running, edge lost
    DOOMED = auto()  # running, cancelled
    ENDED = auto()

    __hash__ = object.__hash__  # members are singletons; Enum's own hash is slow in the table's many look-ups


class Event(Enum):
    """What can happen to a session."""

    PICKED = auto()  # for a step
    MORE = auto()  # step ended; the session can run again
    VERDICT = auto()  # step ended; the session waits for its edge
    DRAFT = auto()
    LOST = auto()
    RESUMED = auto()
    CANCEL = auto()
    FINISHED = auto()

    __hash__ = object.__hash__


# Module names are looked up faster than members of a class, in loops over a thousand sessions.
READY, RUNNING, WAITING, PARKED, ORPHANED, DOOMED, ENDED = State
PICKED, MORE, VERDICT, DRAFT, LOST, RESUMED, CANCEL, FINISHED = Event

S, E = State, Event
TRANSITIONS: dict[State, dict[Event, State]] = {
    S.READY: {
        E.PICKED: S.RUNNING,
        E.DRAFT: S.READY,
        E.VERDICT: S.WAITING,  # answered from what is committed, without the engine
        E.LOST: S.PARKED,
        E.RESUMED: S.WAITING,
        E.CANCEL: S.ENDED,
    },
    S.RUNNING: {
        E.PICKED: S.RUNNING,  # for the step after it
        E.MORE: S.READY,
        E.VERDICT: S.WAITING,
        E.DRAFT: S.RUNNING,
        E.LOST: S.ORPHANED,
        E.RESUMED: S.RUNNING,
        E.CANCEL: S.DOOMED,
        E.FINISHED: S.ENDED,
    },
    S.WAITING: {
        E.PICKED: S.RUNNING,  # decoded while its edge is drafting
        E.DRAFT: S.READY,
        E.LOST: S.PARKED,
        E.RESUMED: S.WAITING,
        E.CANCEL: S.ENDED,
        E.FINISHED: S.ENDED,
    },
    S.PARKED: {E.RESUMED: S.WAITING, E.CANCEL: S.ENDED},
    S.ORPHANED: {
        E.MORE: S.PARKED,
        E.VERDICT: S.PARKED,
        E.RESUMED: S.RUNNING,
        E.CANCEL: S.DOOMED,
        E.FINISHED: S.ENDED,
    },
    S.DOOMED: {E.MORE: S.ENDED, E.VERDICT: S.ENDED, E.FINISHED: S.ENDED},
    S.ENDED: {},
}
IN_ENGINE = frozenset({S.RUNNING, S.ORPHANED, S.DOOMED})
