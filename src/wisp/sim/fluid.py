"""The fluid bound: the devices of a perfect scheduler, for load without randomness.

Sessions that draft do rounds: draft k tokens (or have them ready, drafted ahead), a round trip, a step. At rate r a
round that commits E tokens may take E / r. Steps follow each other without a gap, each takes T, and a session takes
part in one step a round, so

    T + round trip + drafting <= E / r                                      (a round in time)
    devices * (rows of a round + E * prompt / output) = rows(T) * (E / r) / T   (all rows fit)
    devices * (mean tokens of KV per session) <= KV                          (all caches fit)
    devices <= slots                                                         (each has one)

with rows(T) the tokens that fit into a step of length T by the hardware profile, and (E, rows, drafted) from replaying
the recorded positions with the shipped predictor at every threshold: real false accepts and false rejects, ideal
timing. Serving centrally is the case k = 0. The bound is the best of all that, over T and the threshold.

Preemption stretches KV and slots: a session that does its rounds as fast as steps follow each other is ahead of its
SLO, and can do without KV for the rest of the time if its prompt is read twice. So, where `preempts`, some of the
sessions, as few as possible, hold KV for the share (T + round trip + drafting) / (E / r) of their time, and each
costs `prompt` rows more. A server that never preempts (`central`) cannot do that.

It counts devices that are all being served, and all in time. Two things are left out, so a real system may come
closer than it should, or exceed it. A device may *wait* for its first token as long as the TTFT target allows, and
needs no tokens and no KV meanwhile: `Bound.waiting` counts these too, with every answer waiting as long as it may.
And a tolerance for violations could be spent on serving some users not at all.

A good schedule can be *expected* to do less (`ideal=False`): a draft made ahead is of use only if the draft before it
was accepted whole and the verdict's own token was guessed. Then the next draft is with the verifier already. In all
other rounds drafting begins with the verdict, and the draft finds a step under way, half over on average.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from wisp.calibrate.traces.scripts import RECENT, Library, Script, Scripts, library
from wisp.core.draft.policies import LONGEST
from wisp.core.draft.predictor import sigmoid
from wisp.core.verify.cost import Load
from wisp.engines.emulated import Hardware
from wisp.sim.scenario import Kit, Scenario, SloClass

THRESHOLDS = (0.97, *(round(0.95 - 0.05 * i, 2) for i in range(18)))
POSITIONS = 12_000  # replayed for each threshold
FINER = 0.96  # from one length of a step to the next that is tried
# Of drafts accepted whole: the share whose successor was ready, and right about the token in between.
GUESSED = 0.5


@dataclass(frozen=True)
class Point:
    """A way to draft: send tokens while their survival is above `threshold`. Means per round.

    committed: tokens, the target's own included; drafted: tokens drafted (the one that fell below included)
    whole:     share of rounds in which all that was sent is accepted
    """

    threshold: float
    committed: float
    sent: float
    drafted: float
    whole: float


UNDRAFTED = Point(1.0, 1.0, 0.0, 0.0, 1.0)


@functools.lru_cache(maxsize=16)
def operating_points(library: Library, acceptance: float | None = None) -> tuple[Point, ...]:
    """Not drafting at all, and points for thresholds from careful to careless."""
    scripts = Scripts(library, (200, 200), acceptance)
    chosen = [scripts.script(seed) for seed in range(POSITIONS // 200)]
    return (UNDRAFTED, *(_replay(chosen, threshold) for threshold in THRESHOLDS))


def _replay(scripts: Sequence[Script], threshold: float) -> Point:
    rounds = committed = sent = drafted = whole = 0
    for script in scripts:
        base = 0
        while base < len(script):
            chain, tried = _draft(script, base, threshold)
            agreed = 0
            while agreed < len(chain) and script.tokens[base + agreed] == chain[agreed]:
                agreed += 1
            new = min(agreed + 1, len(script) - base)
            base += new
            rounds += 1
            committed += new
            sent += len(chain)
            drafted += tried
            whole += agreed == len(chain)
    return Point(threshold, committed / rounds, sent / rounds, drafted / rounds, whole / rounds)


def _draft(script: Script, base: int, threshold: float) -> tuple[list[int], int]:
    """The draft after `base` tokens, and how many were drafted for it."""
    chain: list[int] = []
    survival = 1.0
    while len(chain) < LONGEST:
        proposal = script.propose(base, len(chain))
        if proposal is None:
            break
        token, signal = proposal
        survival *= sigmoid(script.library.foreteller.odds(signal, len(chain), RECENT, 0.0))
        if survival < threshold:
            return chain, len(chain) + 1
        chain.append(token)
    return chain, len(chain)


@dataclass(frozen=True)
class Bound:
    """Most devices, and how they would be served.

    devices: all of them being served; waiting: with those that wait for a first token as long as they may
    limit:   the scarce resource, "time", "kv" or "slots"
    """

    devices: float
    waiting: float
    point: Point
    step_ms: float
    limit: str


@dataclass(frozen=True)
class Demand:
    """The demand of one session. Tokens are means; rate is in tokens per second, times in milliseconds."""

    rate: float
    prompt: float
    output: float
    draft_ms: float
    rtt_ms: float
    ttft_s: float = 0.0

    @property
    def context(self) -> float:
        return self.prompt + self.output / 2


def fluid_bound(
    profile: Hardware, points: Sequence[Point], demand: Demand, *, ideal: bool = True, preempts: bool = True
) -> Bound:
    """Most devices with `demand`. `ideal`: drafting ahead hides all drafting, and no draft finds a step under way;
    else only where its guess comes true. `preempts`: sessions ahead of their SLO go without KV."""
    most, held_by = min((profile.kv_tokens / demand.context, "kv"), (float(profile.slots), "slots"))
    best = Bound(0.0, 0.0, points[0], 0.0, "time")
    for point in points:
        round_ms = point.committed / demand.rate * 1e3
        drafting_ms = point.drafted * demand.draft_ms
        if drafting_ms > round_ms:
            continue
        unlucky = 0.0 if ideal or not point.sent else 1.0 - GUESSED * point.whole  # share of rounds
        if not point.sent:
            away_ms = 0.0
        elif ideal:
            away_ms = demand.rtt_ms
        else:
            away_ms = unlucky * (demand.rtt_ms + drafting_ms)
        read = point.committed * demand.prompt / demand.output
        t = (round_ms - away_ms) / (1.0 + 0.5 * unlucky)
        while t > 1.0:
            spare = 1.0 - (t * (1.0 + 0.5 * unlucky) + away_ms) / round_ms if preempts else 0.0
            n = _devices(profile, t, round_ms, point.sent + 1 + read, read, demand.context, most, spare)
            if n > best.devices:
                best = Bound(n, 0.0, point, t, held_by if n > 0.99 * most else "time")
            t *= FINER
    waiting = best.devices * (1 + demand.ttft_s * demand.rate / demand.output)
    return Bound(best.devices, waiting, best.point, best.step_ms, best.limit)


def _devices(
    profile: Hardware,
    t: float,
    round_ms: float,
    rows_a_round: float,
    read_a_round: float,
    context: float,
    most: float,
    spare: float,
) -> float:
    """Devices whose rounds, `round_ms` long, fill steps of `t` ms. KV is there for `most` at a time; a session can do
    without it for the share `spare` of its time, and then has to read `read_a_round` rows a round more."""
    low, high = 0.0, 2.0 * profile.slots * round_ms / t
    while high - low > 0.05:
        n = (low + high) / 2
        preempted = max(0.0, 1.0 - most / n) / max(spare, 1e-9)  # share of sessions
        sessions = n * t / round_ms  # in a step
        rows = sessions * (rows_a_round + preempted * read_a_round)
        load = Load(max(1, round(rows)), int(rows * context), int(sessions * context), math.ceil(sessions))
        if preempted <= 1.0 and rows <= profile.step_tokens and profile.step_ms(load) <= t:
            low = n
        else:
            high = n
    return low


@functools.lru_cache(maxsize=256)
def bound(scenario: Scenario, *, central: bool = False, ideal: bool = True, preempts: bool = True) -> Bound:
    """The bound of a scenario; that of a good schedule, if not `ideal`. `central`: without drafts and preemption.

    Users of several classes, or devices of several kinds, are given each its best way of being served, and the
    server's time is shared among them: a device of a kind of which the server could carry N alone takes 1/N of it.
    """
    points: tuple[Point, ...] = (UNDRAFTED,)
    if not central:
        points = operating_points(
            library(Path(scenario.traces), scenario.domain), scenario.acceptance or None
        )
    profile = scenario.profile
    taken = taken_waiting = 0.0
    of_most: tuple[float, Bound] | None = None
    kits = sum(k.share for k in scenario.devices)
    classes = sum(c.share for c in scenario.slo)
    for kit in scenario.devices:
        for slo in scenario.slo:
            share = kit.share / kits * slo.share / classes
            demand = demand_of(scenario, slo, kit)
            found = fluid_bound(profile, points, demand, ideal=ideal, preempts=preempts and not central)
            taken += share / max(found.devices, 1e-9)
            taken_waiting += share / max(found.waiting, 1e-9)
            if of_most is None or share > of_most[0]:
                of_most = (share, found)
    assert of_most is not None
    most = of_most[1]
    return Bound(1 / taken, 1 / taken_waiting, most.point, most.step_ms, most.limit)


def demand_of(scenario: Scenario, slo: SloClass, kit: Kit) -> Demand:
    """The demand of a session of this class on this device."""
    device, link = kit.build()
    return Demand(
        slo.rate,
        sum(scenario.prompt_tokens) / 2,
        sum(scenario.output_tokens) / 2,
        device.draft_ms(),
        link.rtt_ms + link.jitter_ms,
        slo.ttft_s,
    )
