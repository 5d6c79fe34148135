"""The verdict of a cell: is a system worse than central serving at its best?

    attainment     at most 2 points less
    and where central carries the load (violations under 10 %), at most a tenth worse in
    TTFT, median; longest stall, median (equal if both are within one TPOT target); goodput

Each is a difference that must not be above 0, taken seed by seed, since both had the same requests.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean

import msgspec

from wisp.sim.compare.figures import Estimate, SystemFigures

POINTS = 0.02  # of attainment
SHARE = 0.1
CARRIED = 0.1  # violations up to which a load is carried


class Criterion(msgspec.Struct, frozen=True):
    """excess: what it is beyond the limit, seed by seed, in the metric's unit (None: it has no such figure)
    clear:  the whole interval is on one side of the limit
    """

    metric: str
    system: float | None
    central: float
    excess: Estimate | None
    holds: bool
    clear: bool


class Verdict(msgspec.Struct, frozen=True):
    """Of one system in a cell. carried: central at its best carries this load, so that all criteria count."""

    passes: bool
    carried: bool
    criteria: list[Criterion]

    @property
    def says_nothing(self) -> bool:
        """Was nobody served in time, by either?"""
        return not any(c.system or c.central for c in self.criteria if c.metric == "attainment")

    @property
    def missed(self) -> list[Criterion]:
        return [c for c in self.criteria if not c.holds]


def verdict(system: SystemFigures, central: SystemFigures, tpot_ms: float) -> Verdict:
    """Judge. tpot_ms: the shortest TPOT target of the cell."""
    attained = central.mean("attainment") or 0.0
    carried = attained > 1.0 - CARRIED
    criteria = [_criterion("attainment", system, central, lambda ours, theirs: theirs - POINTS - ours)]
    if carried:
        criteria += [
            _criterion("ttft_p50_ms", system, central, _longer),
            _criterion("longest_stall_p50_ms", system, central, _longer, equal_within=tpot_ms),
            _criterion("goodput", system, central, lambda ours, theirs: theirs * (1 - SHARE) - ours),
        ]
    known = [c for c in criteria if c is not None]
    return Verdict(all(c.holds for c in known), carried, known)


def _longer(ours: float, theirs: float) -> float:
    return ours - theirs * (1 + SHARE)


def _criterion(
    metric: str,
    system: SystemFigures,
    central: SystemFigures,
    excess_of: Callable[[float, float], float],
    *,
    equal_within: float = 0.0,
) -> Criterion | None:
    """None where central has no such figure either."""
    pairs = zip(system.seeds[metric], central.seeds[metric], strict=True)
    known = [(ours, theirs) for ours, theirs in pairs if theirs is not None]
    if not known:
        return None
    both = [(ours, theirs) for ours, theirs in known if ours is not None]
    theirs = fmean(theirs for _, theirs in known)
    if len(both) < len(known):  # nobody was served under some seed
        return Criterion(metric, system.mean(metric), theirs, None, False, True)
    excess = Estimate.of([excess_of(ours, theirs) for ours, theirs in both])
    ours = fmean(ours for ours, _ in both)
    holds = excess.mean <= 0 or max(ours, theirs) <= equal_within
    return Criterion(metric, ours, theirs, excess, holds, _clear(excess))


def _clear(excess: Estimate) -> bool:
    """False without an interval, too."""
    return excess.low is not None and excess.high is not None and (excess.low > 0 or excess.high <= 0)
