"""One run of a scenario: build the fleet and its verifier, let time pass, count."""

from __future__ import annotations

import contextlib
import functools
import gc
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from wisp.core.verify.admission import Admission
from wisp.core.verify.cost import Coefficients
from wisp.core.draft.policies import Ahead, Policies
from wisp.core.protocol.slo import Account, account
from wisp.engines.emulated import EmulatedTarget, Hardware
from wisp.sim.devices import Device, Link
from wisp.calibrate.hardware import profiled
from wisp.sim.scenario import Scenario, SloClass, pick, recorded_arrivals
from wisp.calibrate.traces.scripts import Recorded, Scripts, library
from wisp.sim.systems import System
from wisp.sim.timeline import Timeline
from wisp.sim.world import Cloud, Counts, SimDevice, Request, Uplink

CHECK_S = 5.0
BESIDE = 1e7  # tokens per second of a drafter beside the target, as if of a device: its time is the engine's
DRAFTER_MS = 2.0  # a step of a 0.6 B model on the target's accelerator: 1.2 GB read, 28 layers launched


@dataclass
class Outcome:
    """What came of a run. `now`: when it ended."""

    account: Account
    requests: list[Request]
    counts: Counts
    now: float


class Fleet:
    """The devices of a scenario and what they ask, whoever lets `env`'s time pass and whatever is behind `cloud`."""

    handset: type[SimDevice] = SimDevice

    def __init__(
        self,
        scenario: Scenario,
        system: System,
        seed: int,
        env: Timeline,
        cloud: Uplink,
        scripts: Scripts,
        counts: Counts,
        n_vocab: int = 1 << 31,
    ) -> None:
        self.scenario = scenario
        self.system = system
        self.env = env
        self.cloud = cloud
        self.scripts = scripts
        self.counts = counts
        self.n_vocab = n_vocab
        self.predictor = scripts.library.foreteller
        self.source = random.Random(seed)
        self.requests: list[Request] = []
        self.handsets: list[SimDevice] = []
        self.idle: list[SimDevice] = []
        self.wanted = 0
        self.seed = seed

    def begin(self) -> None:
        """Have devices come and go as the scenario says."""
        s = self.scenario
        if s.open:
            self._next_arrival(self._arrivals())
            return
        for at, n in s.population or ((0.0, s.devices_n),):
            self.env.after(at, functools.partial(self._population, n))

    def busy(self) -> bool:
        """Is a request unfinished that arrived in the window?"""
        start, end = self.scenario.warmup_s, self.scenario.warmup_s + self.scenario.window_s
        return any(r.ended is None for r in self.requests if start <= r.arrived < end)

    def outcome(self) -> Outcome:
        """What has come of it, as things stand."""
        start, end = self.scenario.warmup_s, self.scenario.warmup_s + self.scenario.window_s
        counted = account([r.served() for r in self.requests], start, end, self.env.now)
        return Outcome(counted, self.requests, self.counts, self.env.now)

    def _population(self, n: int) -> None:
        """From now on `n` devices are at work; those above stop after the answer they are at."""
        self.wanted = n
        while len(self.handsets) < n:
            self._join()
        while self.idle and len(self.handsets) - len(self.idle) < n:
            self._ask(self.idle.pop())

    def _make(self) -> SimDevice:
        """Another device."""
        s, system = self.scenario, self.system
        index = len(self.handsets)
        kit = pick(random.Random(index * 7919 + 17), s.devices, [k.share for k in s.devices])
        device, link = kit.build()
        if system.beside:
            device, link = Device("beside", BESIDE), Link(0.0)
        policies = (
            Policies(system.drafting, self.predictor, server_mode=system.server_mode)
            if system.drafting
            else None
        )
        handset = self.handset(
            self.env, index, device, link, self.cloud, self.scripts, policies,
            Ahead() if system.ahead else None, self.counts, self.source.getrandbits(32), self._ended, s.retries,
        )  # fmt: skip
        self.handsets.append(handset)
        return handset

    def _join(self) -> None:
        s, handset = self.scenario, self._make()
        wait = self.source.uniform(0.0, s.joining_s) if self.env.now == 0 else 0.0
        self.env.after(wait, lambda: self._ask(handset))
        if s.vanish and self.source.random() < s.vanish:
            at = s.warmup_s + self.source.random() * s.window_s
            self.env.after(max(0.0, at - self.env.now), handset.vanish)

    def _ask(self, handset: SimDevice) -> None:
        if handset.gone:
            return
        s = self.scenario
        # A device's n-th request is the same under every system.
        source = random.Random(f"{self.seed}/{handset.index}/{handset.asked}")
        handset.asked += 1
        slo: SloClass = pick(source, s.slo, [c.share for c in s.slo])
        self._request(handset, slo, source.randint(*s.prompt_tokens), source)

    def _request(self, handset: SimDevice, slo: SloClass, n_prompt: int, source: random.Random) -> None:
        draw, n_vocab = source.getrandbits, self.n_vocab
        prompt = [draw(30) % n_vocab for _ in range(n_prompt)]
        seed, most = source.getrandbits(32), self.scenario.most_output
        if self.scenario.as_recorded:
            script = self.scripts.script(seed)
            prompt, most = script.prompt or prompt, len(script)
        request = Request(seed, prompt, slo.slo, handset.index, self.env.now, most)
        self.requests.append(request)
        handset.start(request)

    def _arrivals(self) -> Iterator[tuple[float, int, SloClass]]:
        """Of an open loop: second, tokens of the prompt, class."""
        s, source = self.scenario, random.Random(f"{self.seed}/arrivals")
        if s.arrivals:
            yield from recorded_arrivals(Path(s.arrivals), s.slo[0])
            return
        at = 0.0
        while True:
            at += source.expovariate(s.arrivals_per_s)
            yield at, source.randint(*s.prompt_tokens), pick(source, s.slo, [c.share for c in s.slo])

    def _next_arrival(self, arrivals: Iterator[tuple[float, int, SloClass]]) -> None:
        """Wait for the next arrival; each comes from a device that is free, or from a new one."""
        found = next(arrivals, None)
        if found is None:
            return
        at, n_prompt, slo = found

        def arrive() -> None:
            handset = self.idle.pop() if self.idle else self._make()
            self._request(handset, slo, n_prompt, random.Random(f"{self.seed}/{at}"))
            self._next_arrival(arrivals)

        self.env.after(max(0.0, at - self.env.now), arrive)

    def _ended(self, handset: SimDevice, request: Request) -> None:
        at_work = len(self.handsets) - len(self.idle)
        if at_work > self.wanted:  # in an open loop, everyone
            self.idle.append(handset)
        elif self.scenario.think_s:
            pause = self.source.expovariate(1.0 / self.scenario.think_s)
            self.env.after(pause, lambda: self._ask(handset))
        else:
            self._ask(handset)


class Simulation(Fleet):
    """A scenario under a system, under a seed, in virtual time."""

    def __init__(self, scenario: Scenario, system: System, seed: int, *, trace: bool = False) -> None:
        scripts, profile = scripts_of(scenario), scenario.profile
        if system.slots:
            profile = msgspec.structs.replace(profile, slots=system.slots)
        eos = scripts.library.eos
        engine = EmulatedTarget(scenario.hardware, profile, scripts.token, n_vocab=1 << 31, eos=eos)
        env, counts = Timeline(), Counts()
        cloud = Cloud(
            env,
            engine,
            system.batching,
            Admission(1 << 20),
            first_guess(profile, scenario.profile_error),
            counts,
            seed,
            drafter_ms=DRAFTER_MS if system.beside else 0.0,
            forecast=system.admission,
        )
        counts.traced = trace
        super().__init__(scenario, system, seed, env, cloud, scripts, counts)

    def run(self, enough: Callable[[Simulation], bool] | None = None) -> Outcome:
        """Warm up, count, drain. `enough` is asked every few seconds whether to stop: the outcome is clear."""
        with _no_collections():
            return self._run(enough)

    def _run(self, enough: Callable[[Simulation], bool] | None) -> Outcome:
        s = self.scenario
        self.begin()
        end = s.warmup_s + s.window_s
        while self.env.now < end:
            self.env.run(until=min(end, self.env.now + CHECK_S))
            if enough is not None and enough(self):
                return self.outcome()
        late = end + s.drain_s
        while self.env.now < late and self.busy():
            self.env.run(until=min(late, self.env.now + 1.0))
        return self.outcome()


@contextlib.contextmanager
def _no_collections() -> Iterator[None]:
    """Hardly anything that a run drops is part of a cycle, and collections go through all that there is. What the run
    before has left, one large cycle, is let go first."""
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
    """What target and drafter say in a scenario. Raises ConfigError."""
    lib = library(Path(scenario.traces), scenario.domain, greedy=scenario.as_recorded)
    kind = Recorded if scenario.as_recorded else Scripts
    return kind(lib, scenario.output_tokens, scenario.acceptance or None)


def first_guess(profile: Hardware, error: float) -> Coefficients:
    """A cost model as `wisp profile` would have fitted it."""
    c = profiled(profile)
    step, token, cached = c.step * error, c.token * error, c.cached * error
    return Coefficients(step, token, cached, c.attention * error, c.beyond * error, c.knee)


def quantile(values: Sequence[float], q: float) -> float:
    """The q-quantile by nearest rank; nan of nothing."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))] if ordered else math.nan
