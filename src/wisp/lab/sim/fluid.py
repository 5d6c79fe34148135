"""The fluid bound: what a perfect scheduler could carry, if load were a fluid and nothing ever waited by chance.

Sessions that draft do rounds: draft k tokens (or have them ready, drafted ahead), a round trip, a step. At rate r a
round that commits E tokens may take E / r. Steps follow each other without a gap, each takes T, and a session takes
part in one step a round, so

    T + round trip + drafting <= E / r                                      (a round in time)
    devices * (rows of a round + E * prompt / output) = rows(T) * (E / r) / T   (all rows fit)
    devices * (mean tokens of KV per session) <= KV                          (all caches fit)

with rows(T) the tokens that fit into a step of length T by the hardware profile, and (E, rows, drafted) from replaying the
recorded positions with the shipped predictor at every threshold: real false accepts and false rejects, ideal timing.
Serving centrally is the case k = 0. The bound is the best of all that, over T and the threshold.
"""

from __future__ import annotations

import functools
import math
import random
from dataclasses import dataclass

from wisp.core.predictor import sigmoid
from wisp.engines.emulated import Hardware
from wisp.lab.sim.scripts import Library, Script, Scripts

LONGEST = 16


@dataclass(frozen=True)
class Point:
    """A way to draft: send tokens while their survival is above `threshold`. Means per round.

    committed: tokens, the target's own included; drafted: tokens drafted (the one that fell below included)
    """

    threshold: float
    committed: float
    sent: float
    drafted: float


def operating_points(library: Library, acceptance: float | None = None, rounds: int = 3000) -> list[Point]:
    """Points for thresholds from careful to careless; and not drafting at all."""
    return list(_operating_points(library, acceptance, rounds))


@functools.lru_cache(maxsize=16)
def _operating_points(library: Library, acceptance: float | None, rounds: int) -> tuple[Point, ...]:
    scripts = Scripts(library, (200, 200), acceptance)
    chosen = [scripts.script(seed) for seed in range(max(4, rounds // 50))]
    thresholds = (0.97, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4, 0.35, 0.3, 0.25, 0.2, 0.15, 0.1)
    return (Point(1.0, 1.0, 0.0, 0.0), *(_replay(chosen, t) for t in thresholds))


def _replay(scripts: list[Script], threshold: float) -> Point:
    rounds = committed = sent = drafted = 0
    for script in scripts:
        base = 0
        foreteller = script.library.foreteller
        while base < len(script):
            chain: list[int] = []
            survival = 1.0
            while len(chain) < LONGEST:
                proposal = script.propose(base, chain)
                if proposal is None:
                    break
                drafted += 1
                survival *= sigmoid(foreteller.odds(proposal[1], len(chain), 0.8, 0.0))
                if survival < threshold:
                    break
                chain.append(proposal[0])
            agreed = 0
            while agreed < len(chain) and script.tokens[base + agreed] == chain[agreed]:
                agreed += 1
            new = min(agreed + 1, len(script) - base)
            base += new
            rounds, committed, sent = rounds + 1, committed + new, sent + len(chain)
    return Point(threshold, committed / rounds, sent / rounds, drafted / rounds)


@dataclass(frozen=True)
class Bound:
    """Most devices, and how they would be served. `limit`: what binds, "time" or "kv"."""

    devices: float
    point: Point
    step_ms: float
    limit: str


def fluid_bound(
    profile: Hardware,
    points: list[Point],
    *,
    rate: float,
    prompt: float,
    output: float,
    kv_tokens: int,
    draft_ms: float,
    rtt_ms: float,
    ahead: bool = True,
) -> Bound:
    """Most devices at `rate` tokens/s. `ahead`: drafting is hidden behind round trip and step as far as it can be."""
    context = prompt + output / 2
    most_kv = kv_tokens / context
    best = Bound(0.0, points[0], 0.0, "time")
    for point in points:
        budget = point.committed / rate * 1e3
        rows_a_round = point.sent + 1 + point.committed * prompt / output
        away = (rtt_ms if point.sent else 0.0) + point.drafted * draft_ms * (0.0 if ahead else 1.0)
        if ahead and point.drafted * draft_ms > budget:
            continue
        latest = budget - away
        t = latest
        while t > 1.0:
            n = _devices(profile, t, budget, rows_a_round, context)
            if n > best.devices:
                best = Bound(min(n, most_kv), point, t, "kv" if n > most_kv else "time")
            t *= 0.93
    return best


def _devices(profile: Hardware, t: float, budget: float, rows_a_round: float, context: float) -> float:
    """Devices whose rounds, `budget` ms long, fill steps of `t` ms."""
    low, high = 0.0, 1e5
    while high - low > 0.05:
        n = (low + high) / 2
        a_step = n * t / budget  # sessions in a step
        if a_step < 1.0 and n > 0:
            a_step = max(a_step, 1e-6)
        rows = a_step * rows_a_round
        ms = profile.step_ms(int(math.ceil(a_step)), max(1, round(rows)), int(rows * context), int(a_step * context))
        if ms <= t:
            low = n
        else:
            high = n
    return low


__all__ = ["Bound", "Point", "fluid_bound", "operating_points", "random"]
