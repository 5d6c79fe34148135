"""What a real edge saw, told again to a drafter with the trace in place of models and processes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from benchmarks.reality.edge import Heard, NotingDrafter, Proposed, Story
from wisp.calibrate.traces.format import Trace
from wisp.core.draft.policies import Ahead, Policies
from wisp.core.draft.round_times import RoundTimes
from wisp.core.draft.task import Action
from wisp.core.protocol.messages import Draft, Open, Verdict
from wisp.core.protocol.step import Committed
from wisp.sim.devices import Device, Link, Server
from wisp.sim.replay import Bench, Tally, _Generation


@dataclass(frozen=True)
class Connected:
    """`Drafter.connected` was called."""

    now_ms: float
    max_draft: int


@dataclass(frozen=True)
class Asked:
    """`Drafter.wants_token` was called, and said `wants`."""

    now_ms: float
    wants: bool


class Told(msgspec.Struct, frozen=True):
    """One verdict as its user saw it."""

    base: int
    drafted: int
    accepted: int


@dataclass
class FullStory(Story):
    """All events, and the drafter's messages and rounds."""

    messages: list[Open | Draft] = field(default_factory=list)
    rounds: list[Told] = field(default_factory=list)
    finish: str = ""

    def took(self, actions: list[Action]) -> None:
        """Note what the drafter did."""
        for action in actions:
            if isinstance(action, Open | Draft):
                self.messages.append(action)
            elif isinstance(action, Committed):
                self.rounds.append(Told(len(self.tokens), action.drafted, action.accepted))
                self.finish = action.finish
        super().took(actions)

    @property
    def drafts(self) -> list[tuple[int, int, list[int], bool]]:
        """Every message to the verifier: round, base, tokens, and whether it is to decode by itself."""
        return [
            (m.round, len(m.committed), m.draft, m.serve)
            if isinstance(m, Open)
            else (m.round, m.base, m.tokens, m.serve)
            for m in self.messages
        ]


class FullDrafter(NotingDrafter):
    """Tells of everything that it is asked, too."""

    def wants_token(self, now_ms: float) -> bool:
        wants = super().wants_token(now_ms)
        self.story.events.append(Asked(now_ms, wants))
        return wants

    def connected(
        self, now_ms: float, max_draft: int, digest: str = "", max_branches: int = 0
    ) -> list[Action]:
        self.story.events.append(Connected(now_ms, max_draft))
        return self.noted(super().connected(now_ms, max_draft, digest))


def fed_back(
    stories: Sequence[FullStory], traces: Sequence[Trace], policies: Policies, ahead: Ahead | None
) -> list[FullStory]:
    """What a replay's `Drafter` makes of the recorded events: proposals and verdicts are the trace's.

    Times and the order of things are taken from the `stories`, which are those of one edge, in order. So are the
    signals that the policy hears: a drafter's logits depend a little on the shape of the batch they come from, and
    a recorder's batches are wide. The events told back have the trace's signals, to hold against the edge's.
    """
    times = RoundTimes()
    told = []
    for story, trace in zip(stories, traces, strict=True):
        bench = Bench(Device("", 1.0), Link(0.0), Server("", 0.0, 0.0))
        replayed = _Generation(trace, bench, policies, ahead, times.successor(), Tally(), random.Random(0))
        told.append(_feed(story, replayed))
        times = replayed.drafter.times
    return told


def _feed(story: FullStory, replayed: _Generation) -> FullStory:
    drafter, again = replayed.drafter, FullStory()
    answered: set[int] = set()
    for event in story.events:
        match event:
            case Connected(now, max_draft):
                again.events.append(event)
                again.took(drafter.connected(now, max_draft))
            case Asked(now):
                again.events.append(Asked(now, drafter.wants_token(now)))
            case Proposed(now, _, took, heard):
                token, signal = replayed._recorded()
                again.events.append(Proposed(now, token, took, signal))
                again.took(drafter.proposed(now, token, heard, took))
            case Heard(now, verdict, arrived):
                same = _verdict(verdict, again, replayed, answered)
                again.events.append(Heard(now, same, arrived))
                again.took(drafter.verdict(now, same, arrived))
    return again


def _verdict(real: Verdict, again: FullStory, replayed: _Generation, answered: set[int]) -> Verdict:
    """The trace's verdict on the draft of that round, or on none: a token that the verifier decodes by itself."""
    server = replayed.server
    sent = next((draft for draft in again.drafts if draft[0] == real.round), None)
    if sent is None or real.round in answered:
        draft = Draft(real.session, real.round, server.committed, [])
    else:
        draft = Draft(real.session, real.round, sent[1], sent[2])
    answered.add(real.round)
    server.round = real.round
    _, verdict = server._step(0.0, draft, 0.0)
    return msgspec.structs.replace(
        verdict,
        session=real.session,
        queue_ms=real.queue_ms,
        engine_ms=real.engine_ms,
        price=real.price,
        cached=real.cached,
    )
