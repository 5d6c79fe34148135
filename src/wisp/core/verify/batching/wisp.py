"""The default batching policy: as many committed tokens per millisecond as the SLOs allow.

A TPOT target holds on average over an answer, so lateness in the middle can be made up, and a large lead has no use.
From this follow five rules for a step. The *lag* of a session is how far it is behind its TPOT target, its *slack*
the time until its next token is due.

1. *Least slack first.* Drafts and decodes take part by due time. Sessions with much slack wait while others need the
   engine, but only as long as the step stays most of its possible length: a step's fixed cost is shared by many.
2. *No dependence on edges.* A session whose edge is still drafting decodes one token if that is nearly due. Its draft
   loses nothing: draft tokens that are committed already are skipped if they agree.
3. *Step length.* A session commits E tokens per round, and one more while its edge drafts. It keeps a TPOT target of
   q if steps take at most q (E + 1) / 2. The step is as long as nearly all sessions can bear.
4. *Prefill just in time.* While nearly all sessions are ahead, prompts are read at once. Otherwise each is read at
   the rate that its own TTFT target needs, and the other sessions have the rest of the time. In a *crowd* of prompts
   rules 1 and 3 change: if half of all time must go to prompts, sessions with a slack of two steps wait, as do those
   that can make up for it, and steps may be four times as long.
5. *Giving up early.* If too many sessions lag, all would soon miss their SLO. Then new prompts, which have cost nothing
   yet, are passed over. A session whose lag cannot be made up loses its SLO and is served at twice its TPOT target.

If KV is short, prompts that do not fit are left out first, so that no session waits for them; `core.verify.preemption`
decides who loses KV. If no session has a TPOT target to average over, due times are strict, and `deadlines` plans the
step. Without any SLO the policy is `continuous`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import attrgetter

from wisp.core.verify.batching.base import Candidate, Grant, Kind, Plan, StepLimits
from wisp.core.verify.batching.deadlines import first_step
from wisp.core.verify.batching.simple import Continuous
from wisp.core.verify.cost import Load

AHEAD_S = 0.6  # slack from which a session waits for others
FULL = 0.6  # share of the longest possible step time; below it no session waits
LOOK = 6.0  # steps; a session whose edge drafts decodes if its next token is due within so many
BEARABLE = 0.1  # share of sessions for which a step may be too long
LEAST = 1.5  # empty steps; a TPOT target that needs shorter steps cannot be kept anyway
EASY_S = 0.3  # no session waits, except for a crowd, and prompts are read at once, if nearly all lead by this
EASY_BUT = 0.15  # nearly all: all but this share
SAFETY_S = 0.3  # a prompt should be read this long before its first token is due
CROWDED = 0.5  # share of the engine's time that prompts need to be in time, from which they are a crowd
HURRY = 2.0  # times the usual length that a step may have for a prompt that cannot wait
CROWD = 4.0  # the same for a crowd
GRACE = 0.1  # share of an answer's remaining time by which it may fall behind in a crowd
LEAD = 2.0  # steps; a session with a smaller lead is pressed
OWED = 4.0  # backlog in steps if all sessions are pressed
TOO_MANY = 0.4  # share of sessions behind their TPOT target from which new prompts are passed over
HOPELESS = 0.25  # a lag of this share of an answer's remaining time cannot be made up
INSTANT_MS = 1e-3  # shortest step time assumed, also of a cost model that has seen little
AGAIN_S = 0.05  # until the next look, if prompts without KV are all there is
PATIENCE_S = 1.0  # longest time for which a session without SLO waits for others

_due = attrgetter("due")


class Wisp:
    """Least slack first, in steps as long as TPOT targets allow."""

    name = "wisp"
    wants_drafting = True

    def __init__(self, *, preempts: bool = True) -> None:
        self.preempts = preempts
        self.continuous = Continuous()

    def plan(self, now: float, candidates: Sequence[Candidate], limits: StepLimits) -> Plan:
        step = _Step(now, limits)
        step.sort(candidates)
        if step.no_slo and not (step.going or step.drafting or step.prompts):
            return self.continuous.plan(now, step.no_slo, limits)
        if not (step.bearable_s or step.lost_bearable_s):
            step.strictly()
        else:
            if limits.free_kv < math.inf:
                step.fit()
            step.measure()
            step.present()
            step.missing()
            step.read()
        step.others()
        return step.plan()


class _Step:
    """One step in the making. Times in milliseconds where a name says so, else in seconds."""

    def __init__(self, now: float, limits: StepLimits) -> None:
        self.now = now
        self.limits = limits
        self.ms = limits.cost.now.ms
        self.going: list[Candidate] = []  # drafts and decodes
        self.drafting: list[Candidate] = []
        self.prompts: list[Candidate] = []
        self.no_slo: list[Candidate] = []
        self.without_kv: list[Candidate] = []  # prompts for which there is no KV
        self.bearable_s: list[float] = []  # for each TPOT target, the longest step that keeps it
        self.lost_bearable_s: list[float] = []  # the same for sessions whose SLO is lost
        self.behind = self.easy = 0
        self.lost: list[int] = []
        self.grants: list[Grant] = []
        self.load = Load()
        self.step_ms = self.ms(self.load)
        self.left = limits.tokens
        self.free_kv = limits.free_kv  # tokens of KV
        self.left_ms = 0.0
        self.longest_ms = math.inf
        self.at_ease = True
        self.overloaded = False  # too many are behind
        self.crowded = False  # prompts need most of the engine's time

    def sort(self, candidates: Sequence[Candidate]) -> None:
        """Sort candidates by what they need."""
        now = self.now
        going, drafting, prompts, no_slo, bearable_s = (
            self.going,
            self.drafting,
            self.prompts,
            self.no_slo,
            self.bearable_s,
        )
        behind = easy = 0
        for w in candidates:
            due = w.due
            if due == math.inf:
                if not w.edge_drafting:
                    no_slo.append(w)
                continue
            lost = w.slo_lost
            if now > due and not lost and (w.first or now - due > HOPELESS * w.remaining * w.tpot_s):
                self.lost.append(w.session)
            if w.edge_drafting:
                drafting.append(w)
            elif w.kind is Kind.PREFILL:
                prompts.append(w)
                continue
            else:
                going.append(w)
            if not w.tpot_s or w.remaining <= w.n_draft + 1:
                continue  # the last round: lateness can no longer be made up
            bearable = w.tpot_s * (w.round_tokens + 1.0) / 2.0
            if lost:
                self.lost_bearable_s.append(2.0 * bearable)
            else:
                bearable_s.append(bearable)
                behind += w.lag_s > 0.0
                easy += w.lag_s < -EASY_S
        self.behind, self.easy = behind, easy

    def fit(self) -> None:
        """Leave out prompts without KV: no session should wait for a prompt that cannot be read."""
        self.free_kv -= sum(w.new for w in self.going)
        prompts, self.prompts = sorted(self.prompts, key=_due), []
        for w in prompts:
            if w.new <= self.free_kv:
                self.free_kv -= w.new
                self.prompts.append(w)
            else:
                self.without_kv.append(w)

    def measure(self) -> None:
        """Decide how long the step may be, and how pressed the sessions are."""
        in_order = sorted(self.bearable_s or self.lost_bearable_s)
        bearable_ms = in_order[int(BEARABLE * len(in_order))] * 1e3
        self.longest_ms = max(bearable_ms, LEAST * self.ms(Load()))
        self.overloaded = self.behind > TOO_MANY * len(self.bearable_s)
        self.prompts.sort(key=_due)
        self.crowded = self._crowd()
        self.at_ease = self.easy >= (1.0 - EASY_BUT) * len(self.bearable_s) and not self.crowded

    def _crowd(self) -> bool:
        """Do prompts need most of the engine's time to be in time, and more than this step has?"""
        empty_ms, rows, needed = self.ms(Load()), 0, 0.0
        for w in self.prompts:
            if not (w.slo_lost or self._let_go(w)):
                rows += w.new
                needed = max(needed, (self.ms(Load(rows)) - empty_ms) / 1e3 / max(self._time(w), SAFETY_S))
        return needed > CROWDED and self._all_ms(rows) > self.longest_ms

    def _let_go(self, w: Candidate) -> bool:
        """Is this a new prompt, not begun, while too many sessions lag?"""
        return self.overloaded and w.first and not w.slo_lost and not w.cached

    def strictly(self) -> None:
        """Strict due times: each candidate is in time or lost."""
        pieces = [w for w in (*self.going, *self.prompts) if w.due > self.now]
        cost = self.limits.cost
        grants, _ = first_step(self.now, pieces, cost.now, cost.margin, self.left)
        by_session = {w.session: w for w in pieces}
        for grant in grants[: self.limits.slices]:
            self._grant(by_session[grant.session], grant.tokens)
        if grants and len(grants) < len(pieces):
            return
        # Late candidates are added only if they make no other late.
        bound = min((by_session[g.session].due for g in grants), default=math.inf)
        longest_ms = (bound - self.now) * 1e3 / cost.margin
        late = [w for w in (*self.going, *self.prompts, *self.drafting) if w.due <= self.now or not grants]
        for w in sorted(late, key=_due):
            if self._full(longest_ms):
                break
            self._add(w, longest_ms)

    def present(self) -> None:
        """Add drafts and decodes, least slack first."""
        self.going.sort(key=_due)
        enough_ms = 0.0 if self.at_ease or self.crowded else FULL * self._all_ms()
        ahead_s = max(AHEAD_S, 2.0 * self.longest_ms / 1e3) if self.crowded else AHEAD_S
        # Otherwise drafts could lock prompts out
        reserved = min(self.limits.tokens // 4, sum(w.new for w in self.prompts))
        self.left -= reserved
        for i, w in enumerate(self.going):
            yielding = not self.at_ease and self.step_ms > enough_ms
            if self._full(self.longest_ms):
                until = self.now + ahead_s if yielding else math.inf
                self._leave(sum(w.new for w in self.going[i:] if w.due <= until))
                break
            grace_s = GRACE * w.remaining * w.tpot_s if self.crowded else 0.0
            ahead = yielding and w.due + grace_s - self.now > ahead_s
            if not (self.grants and ahead) and not self._add(w, self.longest_ms):
                self._leave(w.new)
        self.left += reserved

    def _all_ms(self, rows: int = 0) -> float:
        """Time in ms of a step with all drafts and decodes, and `rows` of prompts."""
        new, attention, cached = rows, 0, 0
        for w in self.going:
            new += w.new
            cached += w.cached
            attention += w.new * (w.cached + w.new)
        return self.ms(Load(new, attention, cached, len(self.going)))

    def missing(self) -> None:
        """Add a decode of sessions whose edge is drafting and whose next token cannot wait for it."""
        self.drafting.sort(key=_due)
        until = self.now + LOOK * self.ms(self.load) / 1e3
        for w in self.drafting:
            if w.due > until or not self._add(w, self.longest_ms):
                break

    def read(self) -> None:
        """Add prompts: whole while there is time, otherwise at the rate that their due times need."""
        at_once = self.at_ease or self.crowded or not self.grants
        step_s = self._step_s()
        hurry_ms = self.longest_ms * (CROWD if self.crowded else HURRY)
        budget = 0.0
        for i, w in enumerate(self.prompts):
            if self._full(hurry_ms):
                self._leave(sum(w.new for w in self.prompts[i:]))
                break
            if self._let_go(w):
                self._leave(w.new)
                continue
            time = self._time(w)
            budget += w.new * min(1.0, step_s / max(time, step_s))
            urgent = time < 2.0 * step_s
            tokens = w.new if at_once or urgent else min(w.new, math.ceil(budget))
            read = self._chunk(w, tokens, hurry_ms if urgent or self.crowded else self.longest_ms)
            budget -= read
            if read < w.new:
                self._leave(w.new - read)

    def _time(self, w: Candidate) -> float:
        """Seconds left to read a prompt."""
        return w.due - self.now - SAFETY_S

    def _step_s(self) -> float:
        """Step time including prefill, solved as a fixed point, in seconds."""
        bare_s, longest_s = max(self.step_ms, INSTANT_MS) / 1e3, self.longest_ms / 1e3
        rate = sum(w.new / max(self._time(w), bare_s) for w in self.prompts)
        share = rate * self.limits.cost.token_ms(self.load) / 1e3
        return max(bare_s, min(bare_s / (1.0 - share), longest_s) if share < 1.0 else longest_s)

    def others(self) -> None:
        """Add sessions without SLO, last, but none waits forever."""
        for w in sorted(self.no_slo, key=lambda w: (w.kind is Kind.PREFILL, w.since, w.session)):
            if self._full(math.inf) or (self.grants and w.new > self.free_kv):
                break
            self.free_kv -= w.new
            patient = self.now - w.since < PATIENCE_S
            longest_ms = self.longest_ms if patient else math.inf
            if w.kind is Kind.PREFILL:
                self._chunk(w, w.new, longest_ms)
            else:
                self._add(w, longest_ms)

    def plan(self) -> Plan:
        """The step, or when to look again."""
        wake_at = None
        if not self.grants and self.drafting:
            lead = LOOK * self.ms(Load()) / 1e3
            wake_at = max(self.now + 1e-3, min(w.due for w in self.drafting) - lead)
            if self.without_kv:  # they may preempt soon
                wake_at = min(wake_at, self.now + AGAIN_S)
        self.left_ms = max(self.left_ms, self._owed() * self.step_ms)
        return Plan(self.grants, wake_at, self.left_ms, self.lost)

    def _owed(self) -> float:
        """Backlog of low-slack sessions, in steps."""
        if not self.bearable_s:
            return 0.0
        lead_s = LEAD * self.step_ms / 1e3
        pressed = sum(
            [w.lag_s > -lead_s for w in (*self.going, *self.drafting) if w.tpot_s and not w.slo_lost]
        )
        return min(1.0, OWED * pressed / len(self.bearable_s))

    def _full(self, longest_ms: float) -> bool:
        """Does no further token fit?"""
        return bool(self.grants) and (
            self.left <= 0
            or len(self.grants) >= self.limits.slices
            or self.step_ms + self.limits.cost.now.token > longest_ms
        )

    def _add(self, w: Candidate, longest_ms: float) -> bool:
        """Add a whole candidate, if it fits and the step does not become too long."""
        if self.grants and (w.new > self.left or len(self.grants) >= self.limits.slices):
            return False
        more = self.load.plus(w.new, w.cached)
        step_ms = self.ms(more)
        if self.grants and step_ms > longest_ms:
            return False
        self.grants.append(Grant(w.session, w.new))
        self.load, self.step_ms = more, step_ms
        self.left -= w.new
        return True

    def _chunk(self, w: Candidate, tokens: int, longest_ms: float) -> int:
        """Add up to `tokens` of a prompt, as many as fit. Returns how many."""
        if len(self.grants) >= self.limits.slices:
            return 0
        tokens = min(tokens, self.left)
        time_ms = longest_ms - self.step_ms
        token_ms = max(self.limits.cost.token_ms(self.load), 1e-6)
        if self.grants and time_ms < tokens * token_ms:
            tokens = int(time_ms / token_ms)
        if tokens <= 0:
            return 0
        self._grant(w, tokens)
        return tokens

    def _grant(self, w: Candidate, tokens: int) -> None:
        self.grants.append(Grant(w.session, tokens))
        self.load = self.load.plus(tokens, w.cached)
        self.step_ms = self.ms(self.load)
        self.left -= tokens

    def _leave(self, tokens: int) -> None:
        self.left_ms += tokens * self.limits.cost.token_ms(self.load)
