"""The due times of a session's tokens, from its SLO."""

from __future__ import annotations

import math

from wisp.core.protocol.slo import Slo

# Share of a target that is used here. The rest of TTFT is for the network; the rest of TPOT for the variance of rounds.
TTFT_SHARE = 0.95
TPOT_SHARE = 0.96

RELAXED = 2.0  # times the TPOT target: how a session is served whose SLO is lost


class Targets:
    """The SLO of a session, and the due times that follow from it. Seconds."""

    __slots__ = ("first_at", "opened", "relaxed_from", "slo", "slo_lost", "tpot_s")

    def __init__(self, slo: Slo | None, now: float, *, begun: bool) -> None:
        self.slo = slo
        self.tpot_s = slo.tpot_ms / 1e3 * TPOT_SHARE if slo else 0.0  # 0: no target
        self.slo_lost = False  # then due times follow the relaxed TPOT target, from `relaxed_from` on
        self.relaxed_from = 0.0
        self.opened = now
        self.first_at = now if begun else math.inf  # when the first token left

    def due(self, committed: int) -> float:
        """When the next token after `committed` ones must leave the verifier; inf without an SLO.

        The way to the user takes equally long for every token. It delays only the first one, whose target counts from
        the request.
        """
        slo = self.slo
        if slo is None:
            return math.inf
        if self.slo_lost and (self.tpot_s or self.first_at == math.inf):
            return self.relaxed_from + committed * RELAXED * self.tpot_s
        if self.first_at < math.inf:
            return self.first_at + committed * self.tpot_s if slo.tpot_ms else math.inf
        return self.opened + slo.ttft_ms / 1e3 * TTFT_SHARE if slo.ttft_ms else math.inf

    def hopeless(self, now: float, committed: int, remaining: int) -> bool:
        """Is the SLO missed whatever happens, even if all of the `remaining` tokens came now?"""
        slo = self.slo
        if slo is None or self.slo_lost:
            return False
        if self.first_at == math.inf:
            return 0.0 < slo.ttft_ms < (now - self.opened) * 1e3
        return 0.0 < slo.tpot_ms * (committed + remaining - 1) < (now - self.first_at) * 1e3

    def drop(self) -> None:
        """Forget an infeasible SLO: the session is served best-effort."""
        self.slo, self.tpot_s, self.slo_lost = None, 0.0, True

    def relax(self, now: float, committed: int) -> None:
        """The SLO is lost: from now on twice the TPOT target is enough."""
        assert self.slo is not None
        grace = self.slo.ttft_ms / 1e3 if self.first_at == math.inf else 0.0
        self.slo_lost = True
        self.relaxed_from = now + grace - committed * RELAXED * self.tpot_s
