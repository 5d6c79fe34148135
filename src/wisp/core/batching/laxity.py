"""Our default batching policy: as many tokens per millisecond as due times allow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import attrgetter

from wisp.core.batching.base import Grant, Kind, Plan, StepLimits, Work
from wisp.core.cost import Load

_due = attrgetter("due")


class Laxity:
    name = "laxity"
    absentees = True
    look = 4.0
    drop = 0.4
    tq = 0.1
    hopeless = 0.25
    cushion = 0.0
    early = 0.3
    ease = 0.1
    bank = 0.6
    few = 0.0
    phi = 0.6

    def plan(self, now: float, work: Sequence[Work], limits: StepLimits) -> Plan:
        cost = limits.cost
        ms, margin = cost.now.ms, cost.margin
        going, absent, prompts, lost = [], [], [], []
        behind = running = easy = 0
        ts = []
        for w in work:
            if not w.late and now > w.due and (w.first or now - w.due > self.hopeless * w.room * w.tpot_s):
                lost.append(w.session)
            if w.absent:
                absent.append(w)
            elif w.kind is Kind.PREFILL:
                prompts.append(w)
                continue
            else:
                going.append(w)
            if not w.late:
                running += 1
                behind += w.lag_s > self.cushion
                easy += w.lag_s > -self.ease
                ts.append(w.tpot_s * (w.usual + 1) / 2)
        going.sort(key=_due)
        absent.sort(key=_due)
        prompts.sort(key=_due)
        grants: list[Grant] = []
        load, left = Load(), limits.tokens
        left_ms = 0.0
        ts.sort()
        tmax = ts[int(self.tq * len(ts))] * 1e3 if ts else math.inf
        al = Load()
        for w in going: al = al.plus(w.new, w.cached)
        full = ms(al) / 1e3
        for w in going:
            if grants and w.due - now > self.bank and ms(load) > self.phi * full * 1e3:
                continue
            m = load.plus(w.new, w.cached)
            if grants and ms(m) > tmax:
                left_ms += w.new * cost.token_ms(load)
                continue
            grants.append(Grant(w.session, w.new)); load = m; left -= w.new
        step = ms(load) / 1e3
        for w in absent:
            if w.due > now + self.look * step: break
            m = load.plus(w.new, w.cached)
            if grants and ms(m) > tmax: break
            grants.append(Grant(w.session, w.new)); load = m; left -= w.new
        overloaded = behind > self.drop * running
        # just in time: each prompt at the rate that its due time asks for
        budget = 0.0
        if running == 0 or easy < 0.1 * running:
            budget = left
        else:
            for w in prompts:
                if overloaded and not w.late and w.first: continue
                budget += w.new * min(1.0, step / max(w.due - now - self.early, 1e-3))
        for w in prompts:
            t = min(w.new, left, math.ceil(budget))
            urgent = w.due - now < self.early + 2 * step
            if overloaded and not w.late and w.first and w.cached == 0: t = 0
            elif urgent: t = min(w.new, left)
            if t <= 0:
                left_ms += w.new * cost.token_ms(load)
                continue
            m = load.plus(t, w.cached)
            grants.append(Grant(w.session, t)); load = m; left -= t; budget -= t
            if t < w.new: left_ms += (w.new - t) * cost.token_ms(load)
        return Plan(grants, now + 0.01 if not grants else None, left_ms, lost)
