"""Baselines at their best in a cell: a small grid for each, decided on seeds of its own.

Central serving has two knobs: a cap on the sessions that the server holds (others wait within their TTFT target, and do
not slow all down) and the tokens of a step (prompts are read in smaller chunks between decodes).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

import msgspec

from wisp.sim.capacity import chunks
from wisp.sim.fluid import bound
from wisp.sim.report import Report
from wisp.sim.runs import Job, remembered
from wisp.sim.scenario import Scenario
from wisp.sim.systems import System, system

CAPS = (1.0, 0.85)  # shares of the sessions that the fluid bound says are served in time
DRAFTS = {"sled": (4, 2, 6), "central-speculative": (3, 1, 2)}  # tokens in a draft
ATTAINED, EARNED = 0.01, 0.02  # differences in attainment, and relative ones in goodput, that are none
WORSE = 0.02  # a run is stopped once clearly so much more is missed than by the first of the grid


def grid(
    name: str, scenario: Scenario, central: System | None = None, *, coarse: bool = False
) -> list[System]:
    """What may be chosen from, the usual first.

    central: as tuned, whose limits a server with a drafter beside it has, too; coarse: a few choices for `central`, and
    the usual for others
    """
    if name == "central":
        return _central(scenario, coarse)
    choices = [system(f"{name},drafting=fixed:{k}") for k in DRAFTS.get(name, ())] or [system(name)]
    if name == "central-speculative" and central is not None:
        choices = [system(_limited(of.name, central.slots, central.step_tokens)) for of in choices]
    return choices[:1] if coarse else choices


def _central(scenario: Scenario, coarse: bool) -> list[System]:
    most = bound(scenario, central=True).devices
    wanted = math.inf if scenario.open or scenario.population else scenario.devices_n
    caps = [round(most * share) for share in CAPS if 4 < most * share < wanted]
    sizes = chunks(most)
    limits = [(cap, size) for cap in (0, *caps) for size in (0, *sizes)]
    if coarse:  # one of each, alone
        limits = [(0, 0), *((cap, 0) for cap in caps[:1]), *((0, size) for size in sizes[-1:])]
    return [system(_limited("central", cap, size)) for cap, size in limits]


def _limited(name: str, slots: int, step_tokens: int) -> str:
    limits = {"slots": slots, "step_tokens": step_tokens}
    return ",".join((name, *(f"{key}={value}" for key, value in limits.items() if value)))


def tuned(choices: Sequence[System], scenario: Scenario, seeds: Sequence[int]) -> System:
    """The best of these."""
    if len(choices) == 1:
        return choices[0]
    tried: list[tuple[System, list[Report]]] = []
    give_up = 0.0
    for of in choices:
        reports = [remembered(Job(scenario, of, seed, give_up)) for seed in seeds]
        tried.append((of, reports))
        give_up = give_up or max(fmean(r.missed for r in reports), 0.05) + WORSE
    return best(tried)


def best(tried: Sequence[tuple[System, Sequence[Report]]]) -> System:
    """The most attainment; where that is equal to a point, the most goodput; where that is too, the lowest median
    TTFT; then the first."""
    figures = [_figures(of, reports) for of, reports in tried]
    attained = max(f.attainment for f in figures)
    figures = [f for f in figures if f.attainment >= attained - ATTAINED]
    goodput = max(f.goodput for f in figures)
    figures = [f for f in figures if f.goodput >= goodput * (1 - EARNED)]
    return min(figures, key=lambda f: f.ttft_ms).system


class _Figures(msgspec.Struct, frozen=True):
    system: System
    attainment: float
    goodput: float
    ttft_ms: float


def _figures(of: System, reports: Sequence[Report]) -> _Figures:
    waited = [r.ttft_ms.median for r in reports if r.ttft_ms.median is not None]
    ttft_ms = fmean(waited) if waited else math.inf
    return _Figures(of, 1.0 - fmean(r.missed for r in reports), fmean(r.goodput for r in reports), ttft_ms)
