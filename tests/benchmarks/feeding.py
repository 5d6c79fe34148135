"""What a real edge saw, told again to a drafter with the trace in place of models and processes."""

from __future__ import annotations

import random
from collections.abc import Sequence

import msgspec

from benchmarks.reality.edge import Asked, Connected, Heard, Proposed, Story
from wisp.calibrate.traces.format import Trace
from wisp.core.draft.policies import Ahead, Policies
from wisp.core.draft.round_times import RoundTimes
from wisp.core.protocol.messages import Draft, Verdict
from wisp.sim.devices import Device, Link, Server
from wisp.sim.replay import Bench, Tally, _Generation


def fed_back(
    stories: Sequence[Story], traces: Sequence[Trace], policies: Policies, ahead: Ahead | None
) -> list[Story]:
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


def _feed(story: Story, replayed: _Generation) -> Story:
    drafter, again = replayed.drafter, Story()
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


def _verdict(real: Verdict, again: Story, replayed: _Generation, answered: set[int]) -> Verdict:
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
    )
