"""The recorder of a verifier for its page: figures by second, device and session.

It looks on: it is told every event with the actions that followed, by a live server, a simulation or the replay of an
event log (`core.verify.loop`). What it says of SLOs is as seen here; what users see is counted at their edges.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from wisp.api.pages.series import Second, Series
from wisp.core.protocol.messages import Open, Refused, Verdict
from wisp.core.protocol.slo import Served, Slo, met
from wisp.core.protocol.step import Slice
from wisp.core.verify.events import Action, EdgeLost, Ended, InEvent, Received, Run, Send, StepDone
from wisp.core.verify.planner import kind_of
from wisp.core.verify.session import Session
from wisp.core.verify.states import ORPHANED, PARKED, READY, RUNNING
from wisp.core.verify.verifier import Verifier

MOST = 200  # devices and sessions in a snapshot
MOST_TARGETS = 64  # SLOs that are counted one by one: requests may name any
OTHERS = Slo()  # stands for the rest of them
THIN = -1  # the device of all clients without an edge


class Life:
    """A session as it is remembered here. Times in seconds."""

    __slots__ = ("device", "first", "last", "opened", "slo", "tokens")

    def __init__(self, device: Device, opened: float, slo: Slo | None) -> None:
        self.device = device
        self.opened = opened
        self.slo = slo
        self.first = self.last = 0.0
        self.tokens = 0

    def served(self, ended: float | None, *, ok: bool = True) -> Served:
        """As `core.protocol.slo` counts it."""
        slo = self.slo or Slo()
        return Served(self.opened, self.first, self.last, self.tokens, slo, ended, ok)


class Device:
    """A connection, and what came over it. speed: tokens per second of its last answer after the first token."""

    __slots__ = (
        "accepted", "draft_ms", "drafted", "ended", "id", "key", "line_ms", "met", "sessions", "slo", "speed", "tokens",
    )  # fmt: skip

    def __init__(self, id_: int, key: str) -> None:
        self.id = id_
        self.key = key
        self.draft_ms = self.line_ms = self.speed = 0.0
        self.drafted = self.accepted = self.tokens = self.sessions = self.ended = self.met = 0
        self.slo: Slo | None = None


class _Step(NamedTuple):
    """A step in flight. alone_ms: predicted for each slice alone."""

    dispatched: float
    estimate_ms: float
    slices: list[tuple[Slice, Life | None]]
    alone_ms: list[float]


class Recorder:
    """Call it after each event. Snapshots are plain data, ready for JSON."""

    def __init__(
        self,
        verifier: Verifier,
        *,
        classes: Mapping[str, Slo] = {},
        width_s: float = 1.0,
        kept: int = 300,
        device: Callable[[int], int] = lambda connection: connection,
        epoch: float = 0.0,
        live: bool = True,
    ) -> None:
        """classes: SLO classes by name. device: of a connection; THIN for clients without an edge.
        epoch: what to add to times: for seconds since 1970, or (not `live`) for seconds since the start of a run.
        live: devices are forgotten when they go."""
        self._verifier = verifier
        self._names = {slo: name for name, slo in classes.items()}
        self._device = device
        self._epoch = epoch
        self._live = live
        self._now: Second = Second()
        self._ends = math.nan  # of the present row
        self.series = Series(width_s, kept)
        self._lives: dict[str, Life] = {}
        self._devices: dict[int, Device] = {}
        self._totals: dict[Slo, list[int]] = {}  # ended, met
        self._in_flight: deque[_Step] = deque()
        self._ended = 0.0  # when the last step ended
        self._idle = self._counts()  # after the last event, if no step was in flight then

    def __call__(self, now: float, event: InEvent, actions: list[Action]) -> None:
        """An event was handled, with these actions."""
        if not now < self._ends:  # also at the start
            self._roll(now, self._counts() if self._in_flight else self._idle)
        if isinstance(event, StepDone):
            self._done(now, event)
        elif isinstance(event, Received) and isinstance(event.message, Open):
            self._opened(now, event, event.message, actions)
        elif isinstance(event, EdgeLost) and self._live:
            self._devices.pop(event.connection, None)
        for action in actions:
            if isinstance(action, Send):
                self._sent(now, action.message)
            elif isinstance(action, Run):
                self._dispatch(now, action)
            elif isinstance(action, Ended):
                self._over(now, action.session, ok=action.why != "expired")
        if not self._in_flight:  # nothing may happen for many rows
            self._idle = self._counts()

    def refused(self) -> None:
        """A session was refused before the verifier heard of it."""
        self._now.refused += 1

    def roll(self, now: float) -> None:
        """Close the rows that are over by `now`; nothing has happened since the last event."""
        self._roll(now, self._counts())

    def _roll(self, now: float, counts: tuple[float, int, int]) -> None:
        width = self.series.width_s
        if math.isnan(self._ends):
            self._ends = now + width
        missed = int((now - self._ends) / width)
        if missed > 1000:  # nothing happened for long
            self._ends += (missed - 1000) * width
        while now >= self._ends:
            self.series.add(self._ends + self._epoch, self._now, self._gauges(*counts))
            self._now = Second()
            self._ends += width

    # --- events

    def _opened(self, now: float, event: Received, open_: Open, actions: list[Action]) -> None:
        answers = (a.message for a in actions if isinstance(a, Send))
        if any(isinstance(m, Refused) and m.session == open_.session for m in answers):
            self._now.refused += 1
            return
        id_ = self._device(event.connection)
        device = self._devices.get(id_)
        if device is None:
            device = self._devices[id_] = Device(id_, event.key if id_ != THIN else "")
        if open_.device is not None:
            device.draft_ms, device.line_ms = open_.device.draft_ms, open_.device.line_ms
        device.slo = open_.slo
        life = self._lives.get(open_.session)
        if life is None:
            self._now.admitted += 1
            life = self._lives[open_.session] = Life(device, now, open_.slo)
            life.tokens = len(open_.committed)
        else:
            life.device.sessions -= 1
            life.device = device
        device.sessions += 1

    def _sent(self, now: float, message: Verdict | Refused) -> None:
        life = self._lives.get(message.session)
        if isinstance(message, Refused):
            if message.fatal and life is not None:
                self._over(now, message.session, ok=False)
            return
        if life is None or (new := message.base + len(message.tokens) - life.tokens) <= 0:
            return
        life.first = life.first or now
        life.last = now
        life.tokens += new
        life.device.tokens += new
        self._now.tokens += new
        if life.slo is None or met(life.served(None), now):
            self._now.good += new
        if message.finish:
            self._over(now, message.session)

    def _over(self, now: float, session: str, *, ok: bool = True) -> None:
        life = self._lives.pop(session, None)
        if life is None:
            return
        device = life.device
        device.sessions -= 1
        if life.tokens > 1 and life.last > life.first:
            device.speed = (life.tokens - 1) / (life.last - life.first)
        if life.slo is None:
            return
        kept = met(life.served(now, ok=ok), now)
        device.ended += 1
        device.met += kept
        full = len(self._totals) >= MOST_TARGETS and life.slo not in (*self._totals, *self._names)
        total = self._totals.setdefault(OTHERS if full else life.slo, [0, 0])
        total[0] += 1
        total[1] += kept
        if kept:
            self._now.met += 1
        else:
            self._now.missed += 1

    def _dispatch(self, now: float, run: Run) -> None:
        cost, sessions, rows = self._verifier.cost, self._verifier.sessions, self._now.rows
        alone_ms = cost.now.ms_of
        step = _Step(now, cost.ms(self._verifier.planner.load), [], [])
        self._in_flight.append(step)
        slack = self._now.slack_ms
        for s in run.slices:
            session, n, start = sessions[s.session], len(s.tokens), s.start
            step.slices.append((s, self._lives.get(session.id)))
            step.alone_ms.append(alone_ms(n, n * (start + n), start, 1))
            rows[kind_of(s)] += n
            if session.targets.slo is not None and (due := session.due) < math.inf:
                slack.append((due - now) * 1e3)

    def _done(self, now: float, done: StepDone) -> None:
        step, second = self._in_flight.popleft(), self._now
        took_ms = (now - max(step.dispatched, self._ended)) * 1e3
        self._ended = now
        second.steps += 1
        second.busy_s += took_ms / 1e3
        second.estimate_ms += step.estimate_ms
        second.interference_ms += [max(0.0, took_ms - alone) for alone in step.alone_ms]
        if done.error:
            return
        for (s, life), result in zip(step.slices, done.results, strict=False):
            if s.n_draft and life is not None:
                life.device.drafted += s.n_draft
                life.device.accepted += result.accepted

    def _counts(self) -> tuple[float, int, int]:
        """Price, sessions with a slot, sessions that could run but have none."""
        v = self._verifier
        return v.policy.price, v.kv.owned_slots, v.n_waiting

    def _gauges(self, price: float, running: int, waiting: int) -> dict[str, float]:
        kv = self._verifier.kv
        used = kv.owned_tokens if running else 0  # a sum over all slots: for a row, not for an event
        return {"price": price, "kv": used / kv.kv_tokens, "running": running, "waiting": waiting}

    # --- snapshots

    def snapshot(self, now: float, since: float = 0.0) -> dict[str, Any]:
        """How things are. since: only rows after this `t`."""
        self.roll(now)
        v = self._verifier
        devices = sorted(self._devices.values(), key=lambda d: (-d.sessions, d.id))
        return {
            "now": now + self._epoch,
            "clock": "unix" if self._live else "run",
            "width_s": self.series.width_s,
            "series": self.series.since(since),
            "sessions": [
                self._session(now, s) for _, s in zip(range(MOST), v.sessions.values(), strict=False)
            ],
            "n_sessions": len(v.sessions),
            "devices": [self._row(d) for d in devices[:MOST]],
            "n_devices": len(devices),
            "classes": [self._class(slo, *total) for slo, total in self._totals.items()],
            "kv": {"used": v.kv.owned_tokens, "all": v.kv.kv_tokens, "slots": v.limits.slots},
            "cost_model": {"error": round(v.cost.error, 4), "margin": round(v.cost.margin, 3)},
        }

    def _class(self, slo: Slo, ended: int, kept: int) -> dict[str, Any]:
        return {
            "name": "others" if slo == OTHERS else self._names.get(slo, ""),
            "ttft_ms": slo.ttft_ms,
            "tpot_ms": slo.tpot_ms,
            "ended": ended,
            "met": kept,
        }

    def _named(self, slo: Slo | None) -> str:
        """The class of these targets, or the targets."""
        if slo is None:
            return ""
        targets = (f"{name} {ms:.4g} ms" for name, ms in (("TTFT", slo.ttft_ms), ("TPOT", slo.tpot_ms)) if ms)
        return self._names.get(slo) or ", ".join(targets)

    def _row(self, d: Device) -> dict[str, Any]:
        return {
            "id": d.id,
            "key": d.key,
            "thin": d.id == THIN,
            "sessions": d.sessions,
            "draft_per_s": round(1e3 / d.draft_ms, 1) if d.draft_ms else None,
            "rtt_ms": round(d.line_ms, 1) if d.line_ms else None,
            "drafted": d.drafted,
            "accepted": d.accepted,
            "speed": round(d.speed, 1) if d.speed else None,
            "tokens": d.tokens,
            "slo": self._named(d.slo),
            "ended": d.ended,
            "met": d.met,
        }

    def _session(self, now: float, s: Session) -> dict[str, Any]:
        due = s.due
        life = self._lives.get(s.id)
        return {
            "id": s.id[:8],
            "device": life.device.id if life is not None else None,
            "key": s.key,
            "waits_for": waits_for(s),
            "since_s": round(now - s.since, 2),
            "prompt": s.progress.n_prompt,
            "tokens": s.n_committed,
            "slack_ms": round((due - now) * 1e3) if due < math.inf else None,
            "slo_lost": s.targets.slo_lost,
            "acceptance": round(s.speed.acceptance, 3),
        }


def waits_for(s: Session) -> str:
    """A word for what has to happen before a session goes on; the page has the sentence."""
    if s.state is PARKED or s.state is ORPHANED:
        return "edge_gone"
    if s.state is RUNNING:
        return "engine"
    if s.state is READY:
        return "slot" if s.slot is None else "step"
    return "edge"
