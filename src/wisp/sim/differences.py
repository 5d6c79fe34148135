"""A live run beside a simulation of the same: figures to compare, and the aim for each."""

from __future__ import annotations

import math

import msgspec

from wisp.sim.report import Report

AIMS = {  # live against simulated
    "goodput": 0.05,
    "attainment": 0.05,  # absolute; the others are relative
    "median_tpot_ms": 0.05,
    "p99_tpot_ms": 0.15,
}
# Without an aim: they depend on the requests that happen to share a step.
SHOWN = ("median_ttft_ms", "p99_ttft_ms")


class Difference(msgspec.Struct, frozen=True):
    """off: live over simulated less one; of attainment, live less simulated. aim: the most it should be (0: none)."""

    name: str
    live: float
    simulated: float
    off: float
    aim: float

    @property
    def missed(self) -> bool:
        """Is it farther off than it should be?"""
        return self.aim > 0.0 and not abs(self.off) <= self.aim

    def __str__(self) -> str:
        points = self.name == "attainment"
        off = f"{self.off * 100:+.1f} points" if points else f"{self.off:+.1%}"
        if not self.aim:
            return off
        aim = f"{self.aim * 100:.0f}" if points else f"{self.aim:.0%}"
        return f"{off} (aim: within {aim}{', MISSED' if self.missed else ''})"


def differences(live: Report, simulated: Report) -> list[Difference]:
    """One for each compared figure. A figure that a run does not have is nan, which misses every aim."""
    found = []
    ours, theirs = live.benchmark(), simulated.benchmark()
    for name in (*AIMS, *SHOWN):
        a, b = (math.nan if x[name] is None else x[name] for x in (ours, theirs))
        off = a - b if name == "attainment" else (a / b - 1 if b else math.nan)
        found.append(Difference(name, a, b, off, AIMS.get(name, 0.0)))
    return found
