"""One run of a scenario: build the fleet and its verifier, let time pass, count."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec

from wisp.calibrate.hardware import profiled
from wisp.calibrate.traces.scripts import Recorded, Scripts, library
from wisp.core.draft.policies import Ahead, Policies
from wisp.core.errors import ProtocolError
from wisp.core.protocol.messages import MAX_BRANCHES
from wisp.core.verify.admission import Admission
from wisp.core.verify.cost import Coefficients
from wisp.engines.emulated import EmulatedTarget, Hardware
from wisp.sim.devices import Device, Link
from wisp.sim.request import Request
from wisp.sim.scenario import Kit, Scenario, SloClass, pick, recorded_arrivals
from wisp.sim.sim_device import Shared, SimDevice, Uplink
from wisp.sim.sim_verifier import Event, SimVerifier, VerifierCounts
from wisp.sim.systems import System
from wisp.sim.timeline import Timeline

CHECK_S = 5.0  # simulated, between two looks at whether the outcome is clear
JUST_BEFORE_S = 1e-6  # the end of the window, which belongs to the drain
BESIDE = 1e7  # tokens per second of a drafter beside the target, as if of a device: its time is the engine's
DRAFTER_MS = 2.0  # a step of a 0.6 B model on the target's accelerator: 1.2 GB read, 28 layers launched


class Fleet:
    """The devices of a scenario and their requests. `env` and `uplink` may be simulated, or live."""

    device_class: type[SimDevice] = SimDevice

    def __init__(
        self,
        scenario: Scenario,
        system: System,
        seed: int,
        env: Timeline,
        uplink: Uplink,
        scripts: Scripts,
        *,
        n_vocab: int = 1 << 31,
        trace: list[Event] | None = None,
    ) -> None:
        self.scenario = scenario
        self.system = system
        self.seed = seed
        self.env = env
        self.n_vocab = n_vocab
        self.shared = Shared(
            env,
            uplink,
            scripts,
            self._ended,
            Ahead() if system.ahead else None,
            scenario.retries,
            branches=MAX_BRANCHES if system.branches else 0,
            trace=trace,
        )
        self.source = random.Random(seed)
        self.requests: list[Request] = []
        self.devices: list[SimDevice] = []
        self.idle: list[SimDevice] = []
        self.kits: list[Kit] = []  # of each device
        self.wanted = 0  # devices at work

    def begin(self) -> None:
        """Have devices come and go as the scenario says."""
        s = self.scenario
        if s.open:
            self._next_arrival(arrivals(s, self.seed))
            return
        for at, n in s.population or ((0.0, s.devices_n),):
            self.env.after(at, functools.partial(self._population, n))

    def window(self) -> list[Request]:
        """The requests that count: they arrived in the window."""
        start, end = self.scenario.warmup_s, self.scenario.warmup_s + self.scenario.window_s
        return [r for r in self.requests if start <= r.arrived < end]

    def busy(self) -> bool:
        return any(r.ended is None for r in self.window())

    def _population(self, n: int) -> None:
        """From now on `n` devices are at work; a surplus device stops after its present answer."""
        self.wanted = n
        while len(self.devices) < n:
            self._join()
        while self.idle and len(self.devices) - len(self.idle) < n:
            self._ask(self.idle.pop())

    def _make(self, kit: Kit | None = None) -> SimDevice:
        """Add a device; of which kind, says its index or the caller."""
        system, index = self.system, len(self.devices)
        kit = kit or self._kit(random.Random(index * 7919 + 17))
        profile, link = kit.build()
        away_s = 0.0
        if system.beside:  # drafts need no link, but the user is as far away as ever
            away_s = (link.rtt_ms + link.jitter_ms) / 1e3
            profile, link = Device("beside", BESIDE), Link(0.0)
        predictor = self.shared.scripts.library.foreteller
        policies = (
            Policies(system.drafting, predictor, server_mode=system.server_mode) if system.drafting else None
        )
        made = self.device_class(self.shared, index, profile, link, policies, self.source.getrandbits(32))
        made.away_s = away_s
        self.devices.append(made)
        self.kits.append(kit)
        return made

    def _kit(self, source: random.Random) -> Kit:
        kits = self.scenario.devices
        return pick(source, kits, [k.share for k in kits])

    def _join(self) -> None:
        s, device = self.scenario, self._make()
        wait = self.source.uniform(0.0, s.joining_s) if self.env.now == 0 else 0.0
        self.env.after(wait, lambda: self._ask(device))
        if s.vanish and self.source.random() < s.vanish:
            at = s.warmup_s + self.source.random() * s.window_s
            self.env.after(max(0.0, at - self.env.now), device.vanish)

    def _ask(self, device: SimDevice) -> None:
        if device.gone:
            return
        s = self.scenario
        # A device's n-th request is the same under every system.
        source = random.Random(f"{self.seed}/{device.index}/{device.asked}")
        device.asked += 1
        slo: SloClass = pick(source, s.slo, [c.share for c in s.slo])
        self._request(device, slo, source.randint(*s.prompt_tokens), source)

    def _request(self, device: SimDevice, slo: SloClass, n_prompt: int, source: random.Random) -> None:
        draw, n_vocab = source.getrandbits, self.n_vocab
        prompt = [draw(30) % n_vocab for _ in range(n_prompt)]
        seed, most = source.getrandbits(32), self.scenario.most_output
        if self.scenario.as_recorded:
            script = self.shared.scripts.script(seed)
            prompt, most = script.prompt or prompt, len(script)
        request = Request(seed, prompt, slo.slo, device.index, self.env.now, most)
        self.requests.append(request)
        device.start(request)

    def _next_arrival(self, arrivals: Iterator[tuple[float, int, SloClass]]) -> None:
        """Wait for the next arrival; each comes from a device that is free, or from a new one. Its kind is that of the
        arrival, so that it is the same under every system."""
        found = next(arrivals, None)
        if found is None:
            return
        at, n_prompt, slo = found

        def arrive() -> None:
            kit = self._kit(random.Random(f"{self.seed}/{at}/kit"))
            free = (i for i in reversed(range(len(self.idle))) if self.kits[self.idle[i].index] == kit)
            i = next(free, None)
            device = self._make(kit) if i is None else self.idle.pop(i)
            self._request(device, slo, n_prompt, random.Random(f"{self.seed}/{at}"))
            self._next_arrival(arrivals)

        self.env.after(max(0.0, at - self.env.now), arrive)

    def _ended(self, device: SimDevice, request: Request) -> None:
        at_work = len(self.devices) - len(self.idle)
        if at_work > self.wanted:  # always, in an open loop
            self.idle.append(device)
        elif self.scenario.think_s:
            pause = self.source.expovariate(1.0 / self.scenario.think_s)
            self.env.after(pause, lambda: self._ask(device))
        else:
            self._ask(device)


def arrivals(s: Scenario, seed: int) -> Iterator[tuple[float, int, SloClass]]:
    """Of an open loop, until its drain ends: second, tokens of the prompt, class."""
    end = s.warmup_s + s.window_s + s.drain_s
    coming = recorded_arrivals(Path(s.arrivals), s.slo[0]) if s.arrivals else _at_random(s, seed)
    return itertools.takewhile(lambda arrival: arrival[0] <= end, coming)


def _at_random(s: Scenario, seed: int) -> Iterator[tuple[float, int, SloClass]]:
    source, at = random.Random(f"{seed}/arrivals"), 0.0
    while True:
        at += gap_s(source, s.arrivals_per_s, s.arrivals_cv)
        yield at, source.randint(*s.prompt_tokens), pick(source, s.slo, [c.share for c in s.slo])


def most_devices(s: Scenario, seed: int) -> int:
    """Devices that a fleet cannot exceed: in an open loop one for each arrival, as if no answer ended."""
    if s.open:
        return sum(1 for _ in arrivals(s, seed))
    return max(n for _, n in s.population or ((0.0, s.devices_n),))


class Simulation(Fleet):
    """A scenario under a system, under a seed, in virtual time."""

    def __init__(
        self, scenario: Scenario, system: System, seed: int, *, trace: bool = False, row_s: float = 0.0
    ) -> None:
        """row_s: see `SimVerifier`."""
        scripts, profile = scripts_of(scenario), scenario.profile
        profile = msgspec.structs.replace(
            profile,
            slots=system.slots or profile.slots,
            step_tokens=system.step_tokens or profile.step_tokens,
        )
        eos = scripts.library.eos
        engine = EmulatedTarget(scenario.hardware, profile, scripts.token, n_vocab=1 << 31, eos=eos)
        env = Timeline()
        events: list[Event] | None = [] if trace else None
        self.verifier = SimVerifier(
            env,
            engine,
            system.batching,
            Admission(1 << 20),
            first_guess(profile, scenario.profile_error),
            seed,
            drafter_ms=DRAFTER_MS if system.beside else 0.0,
            slo_admission=system.admission,
            depth=system.depth,
            trace=events,
            row_s=row_s,
        )
        self.marks: list[VerifierCounts] = []  # at both ends of the window
        super().__init__(scenario, system, seed, env, self.verifier, scripts, trace=events)

    def run(self, enough: Callable[[Simulation], bool] | None = None) -> None:
        """Warm up, count, drain. `enough` is asked every few seconds whether to stop: the outcome is clear.

        Raises ProtocolError where a device was told something else than its script says: that is a bug of ours.
        """
        with _no_collections():
            self._run(enough)
        if wrong := sum(d.compared()[1] for d in self.devices):
            raise ProtocolError(
                "internal_error", f"{wrong} simulated tokens are not the target's: a bug of wisp"
            )

    def _run(self, enough: Callable[[Simulation], bool] | None) -> None:
        s = self.scenario
        end = s.warmup_s + s.window_s
        for at in (s.warmup_s, end - JUST_BEFORE_S):
            self.env.after(at, lambda: self.marks.append(copy.copy(self.verifier.counts)))
        self.begin()
        while self.env.now < end:
            self.env.run(until=min(end, self.env.now + CHECK_S))
            if enough is not None and enough(self):
                return
        late = end + s.drain_s
        while self.env.now < late and self.busy():
            self.env.run(until=min(late, self.env.now + 1.0))


@contextlib.contextmanager
def _no_collections() -> Iterator[None]:
    """Without garbage collections, which cost much and find nothing: a run drops hardly any cycles. The run before,
    itself one large cycle, is collected first."""
    if not gc.isenabled():
        yield
        return
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def scripts_of(scenario: Scenario) -> Scripts:
    """The texts of target and drafter in a scenario. Raises ConfigError."""
    lib = library(Path(scenario.traces), scenario.domain, greedy=scenario.as_recorded)
    kind = Recorded if scenario.as_recorded else Scripts
    return kind(lib, scenario.output_tokens, scenario.acceptance or None)


def gap_s(source: random.Random, per_s: float, cv: float) -> float:
    """Seconds between two arrivals: a gamma distribution with that mean rate and coefficient of variation."""
    if cv == 1.0:
        return source.expovariate(per_s)
    return source.gammavariate(1 / cv**2, cv**2 / per_s)


def first_guess(profile: Hardware, error: float) -> Coefficients:
    """A cost model as `wisp profile` would have fitted it."""
    c = profiled(profile)
    step, token, cached = c.step * error, c.token * error, c.cached * error
    return Coefficients(step, token, cached, c.attention * error, c.beyond * error, c.knee, c.slice * error)


def quantile(values: Sequence[float], q: float) -> float:
    """The q-quantile by nearest rank; nan of nothing."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))] if ordered else math.nan
