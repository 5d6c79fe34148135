"""`wisp plan`: how many devices a verifier can carry, whether WISP is worth it there, and when it is not.

The fluid bounds of drafting, as far as a good schedule gets, and of serving centrally, times what share of them to
expect (`expected`): what capacity searches reached, less where circumstances are harder than they were there. With
`simulate`, short simulations overrule the estimate: at the number of devices asked for and, where these are too many,
at fewer, until a number is found that is carried. All that is said follows from the numbers of devices found so. Three
of the five verdicts say not to use WISP.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Sequence
from enum import StrEnum

import msgspec
import numpy as np

from wisp.core.cost import Load
from wisp.core.errors import ConfigError
from wisp.engines.emulated import Hardware
from wisp.lab.sim.fluid import Bound, bound, demand_of
from wisp.lab.sim.profiled import Measured
from wisp.lab.sim.runs import Job, Runs, remembered
from wisp.lab.sim.scenario import Kit, Scenario, SloClass
from wisp.lab.sim.systems import System, system

NAMES = ("ours", "central")
TOLERANCES = (0.01, 0.1)
# Shares that capacity searches reached with these tolerances: `capacity_at_1_percent` and `capacity`, in
# docs/results/capacity.json, the first rows of `wisp experiments table`. Ours, of what can be expected of good
# schedules (`bound` that is not `ideal`), hardly depends on the pace. Central's, of its bound, does: by tokens/s.
OURS = (0.89, 0.98)
CENTRAL = {8.0: (0.922, 1.01), 12.0: (0.89, 1.041), 16.0: (0.752, 0.774), 20.0: (0.66, 0.813)}
USUAL_WAIT_S, USUAL_OUTPUT = 3.0, 200.0  # TTFT target and tokens of an answer there
# Share to take off for each more of the tokens of a step that are of prompts than usual: they come in lumps. Chosen so
# that what is expected was carried in searches with longer prompts.
USUAL_LUMPS = 0.4
LUMPY = {"ours": 0.45, "central": 0.25}
LENT = 0.25  # of what could be gained by lending KV, up to as many devices again: seen at 2 to 6 tokens/s
PLENTY = 10**9  # tokens of KV
WORTH_IT = 1.1  # so many times the devices, or it is not worth a drafter on each
CLOSE = 0.15  # an estimate so close to the devices asked for decides nothing
SEEDS = (1, 2)
GRAIN = 0.1  # a search ends once it knows the number of devices to this share
LONGEST_S = 300.0  # of a warm-up
Watch = Callable[[str, int, int], None]  # what is simulated, runs done, runs known to be needed


class Verdict(StrEnum):
    """What to do."""

    WISP = "use WISP"
    MORE = "use WISP, on more than one verifier"
    ENOUGH = "serve centrally: one server carries all of them without drafts"
    NO_GAIN = "serve centrally: drafts gain nothing here, or next to nothing"
    NEITHER = "neither: this verifier cannot serve such users, with or without drafts"


class Estimate(msgspec.Struct, frozen=True):
    """Of one way of serving.

    bound:     the fluid bound
    devices:   how many to expect one server to carry; tried: a simulation has found this number
    limit:     what binds: time, kv, slots, context (a session is longer than a slot) or ttft (a first token takes
               longer than users wait, even on an idle server)
    simulated: violation rate at the devices asked for (None: not simulated)
    """

    bound: float
    devices: int
    limit: str
    tried: bool = False
    simulated: float | None = None

    def carries(self, n: int) -> bool:
        """Does one server carry `n` devices?"""
        return self.devices >= n

    def servers(self, n: int) -> int:
        """How many are needed for `n` devices; 0: no number of them will do."""
        return math.ceil(n / self.devices) if self.devices else 0


class Plan(msgspec.Struct, frozen=True):
    """Advice. reasons: in plain words; assumed: how each of the two would be run; commands: for what is advised."""

    verdict: Verdict
    devices: int
    ours: Estimate
    central: Estimate
    reasons: tuple[str, ...]
    assumed: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()


def scenario_for(
    hardware: str,
    devices: int,
    device: str,
    rtt_ms: float,
    rate: float,
    prompt: tuple[int, int] = (60, 200),
    output: tuple[int, int] = (100, 300),
    ttft_s: float = 3.0,
    acceptance: float | None = None,
) -> Scenario:
    """What is planned, as a scenario of short runs. Raises ConfigError."""
    if devices < 1:
        raise ConfigError(f"--devices {devices}: plan for at least one")
    _positive("--rate", rate, "tokens per second")
    _positive("--ttft", ttft_s, "seconds")
    if not (math.isfinite(rtt_ms) and rtt_ms >= 0):
        raise ConfigError(f"--rtt {rtt_ms:g}: give 0 or more ms")
    if acceptance is not None and not 0 < acceptance <= 1:
        raise ConfigError(f"--acceptance {acceptance:g}: give a share, more than 0 and at most 1")
    kit = Kit(device, rtt_ms)
    _positive("--device", kit.build()[0].tokens_per_s, "drafted tokens per second, or a profile")
    return Scenario(
        title=f"{devices} devices on {hardware}",
        hardware=hardware,
        slo=(SloClass(rate, ttft_s),),
        devices=(kit,),
        prompt_tokens=prompt,
        output_tokens=output,
        devices_n=devices,
        acceptance=acceptance or 0.0,
        warmup_s=min(max(30.0, sum(output) / 2 / rate), LONGEST_S),
        window_s=30.0,
        drain_s=min(max(45.0, 1.2 * output[1] / rate), LONGEST_S),
    )


def _positive(option: str, value: float, what: str) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(f"{option} {value:g}: give a number of {what}, more than 0")


def plan(
    scenario: Scenario,
    *,
    tolerance: float = 0.1,
    simulate: bool = False,
    runs: Runs | None = None,
    watch: Watch = lambda what, done, of: None,
) -> Plan:
    """What to do for a scenario of one class and one kind of device. Raises ConfigError."""
    if not TOLERANCES[0] <= tolerance <= 0.5:
        raise ConfigError(f"--tolerance {tolerance:g}: give a share between {TOLERANCES[0]:g} and 0.5")
    n = scenario.devices_n
    found = {name: _estimate(name, scenario, tolerance) for name in NAMES}
    if simulate and any(e.limit not in ("context", "ttft") for e in found.values()):
        found = _Trials(scenario, tolerance, runs or Runs(), watch).overrule(found)
    ours, central = found["ours"], found["central"]
    verdict = _verdict(n, ours, central)
    return Plan(
        verdict,
        n,
        ours,
        central,
        tuple(_reasons(scenario, verdict, ours, central)),
        _assumed(scenario),
        _commands(scenario, verdict, ours, central),
    )


# --- the estimate


def _estimate(name: str, scenario: Scenario, tolerance: float) -> Estimate:
    profile = scenario.profile
    if _longest(scenario) > min(profile.slot_tokens, profile.kv_tokens):
        return Estimate(0.0, 0, "context")
    kept_up = _kept_up(scenario)
    if _idle_ttft_ms(kept_up) > scenario.slo[0].ttft_s * 1e3:
        return Estimate(0.0, 0, "ttft")
    limit = bound(kept_up, central=name == "central")
    devices = int(expected(name, kept_up, tolerance))
    return Estimate(round(limit.devices, 1), devices, limit.limit)


def expected(name: str, scenario: Scenario, tolerance: float = 0.1) -> float:
    """Devices to expect of a system: the share that searches reached of what its bound or, with drafts, good schedules
    carry, and less of it where prompts come in larger lumps than there or users are less patient."""
    central = name == "central"
    at_once = bound(scenario, central=central, lends=False).devices
    lent = LENT * (bound(scenario, central=central).devices - at_once)
    memory = at_once + min(lent, at_once)
    unlimited = msgspec.structs.replace(scenario, kv_tokens=PLENTY, slots=PLENTY // 1000)
    in_time = bound(unlimited, central=central, ideal=central)
    share = reached(name, scenario.slo[0].rate, tolerance)
    if not in_time.point.sent:  # it serves centrally, too
        share = min(share, reached("central", scenario.slo[0].rate, tolerance))
    left = 1.0 - _lumpiness(name, scenario, in_time)
    return share * _patience(scenario) * max(0.0, min(memory, left * in_time.devices))


def _lumpiness(name: str, scenario: Scenario, limit: Bound) -> float:
    """What to take off because more of the tokens that steps take are prompts."""
    point, demand = limit.point, demand_of(scenario, scenario.slo[0], scenario.devices[0])
    fed = point.committed * demand.prompt / demand.output
    return LUMPY[name] * max(0.0, fed / (fed + point.sent + 1) - USUAL_LUMPS)


def reached(name: str, rate: float, tolerance: float = 0.1) -> float:
    """Share that a system reached: between the rates that were searched by a line, beyond them as at the last; between
    tolerances by their logarithm."""
    by_tolerance: Sequence[float] = OURS
    if name == "central":
        by_tolerance = [
            float(np.interp(rate, list(CENTRAL), [r[i] for r in CENTRAL.values()])) for i in (0, 1)
        ]
    return float(np.interp(math.log(tolerance), np.log(TOLERANCES), by_tolerance))


def _patience(scenario: Scenario) -> float:
    """Users who wait for a first token need nothing meanwhile: fewer devices where waits are a smaller part of it all
    than where shares were searched. Where they are a larger one it is not counted on."""
    slo, output = scenario.slo[0], sum(scenario.output_tokens) / 2
    return min(1.0, (1 + slo.ttft_s * slo.rate / output) / (1 + USUAL_WAIT_S * slo.rate / USUAL_OUTPUT))


def _kept_up(scenario: Scenario) -> Scenario:
    """With the speed that devices keep up once they are warm."""
    kit = scenario.devices[0]
    device, _ = kit.build()
    if device.throttle >= 1.0:
        return scenario
    slower = msgspec.structs.replace(kit, device=f"{device.tokens_per_s * device.throttle:g}")
    return msgspec.structs.replace(scenario, devices=(slower,))


def _longest(scenario: Scenario) -> int:
    """Tokens of the longest session."""
    return scenario.prompt_tokens[1] + scenario.output_tokens[1]


def _idle_ttft_ms(scenario: Scenario) -> float:
    """Until the first token of a mean prompt, if nobody else asks for anything."""
    profile, prompt = scenario.profile, sum(scenario.prompt_tokens) // 2
    steps = math.ceil(prompt / profile.step_tokens)
    each = math.ceil(prompt / steps)
    loads = [Load(each, each * (i + 1) * each, i * each, 1) for i in range(steps)]
    return scenario.devices[0].rtt_ms + sum(map(profile.step_ms, loads))


# --- simulations


class _Trials:
    """Simulations of a scenario with this or that many devices, centrally with a cap on sessions where steps would
    grow too long."""

    def __init__(self, scenario: Scenario, tolerance: float, runs: Runs, watch: Watch) -> None:
        self.scenario = scenario
        self.tolerance = tolerance
        self.runs = runs
        self.watch = watch
        self.done = self.known = 0

    def overrule(self, found: dict[str, Estimate]) -> dict[str, Estimate]:
        """Estimates as simulations have them."""
        n = self.scenario.devices_n
        rates = self.violations([(name, n) for name in found])
        settled = {}
        for (name, e), rate in zip(found.items(), rates, strict=True):
            devices, tried = max(e.devices, n), e.devices <= n
            if rate > self.tolerance:
                devices, tried = self.most(name, e.devices), True
            settled[name] = msgspec.structs.replace(e, devices=devices, tried=tried, simulated=rate)
        return settled

    def most(self, name: str, start: int) -> int:
        """The most devices, fewer than asked for, that are carried; 0 if not even one is."""
        low, high = 0, self.scenario.devices_n
        at, less = max(1, min(start, int(0.9 * high))), 0.85
        while high - low > max(1, GRAIN * low):
            (rate,) = self.violations([(name, at)])
            if rate <= self.tolerance:
                low = at
            else:
                high = at
            at, less = (low + high) // 2 if low else max(1, int(at * less)), max(0.5, 0.85 * less)
        return low

    def violations(self, tried: Sequence[tuple[str, int]]) -> list[float]:
        """Share of requests that miss their SLO, for each system and number of devices."""
        jobs = [
            Job(scenario, _at_its_best(name, scenario), seed, self.tolerance)
            for name, scenario in ((name, self.scenario.with_devices(n)) for name, n in tried)
            for seed in SEEDS
        ]
        what = " and ".join(f"{n} {'with WISP' if name == 'ours' else 'without'}" for name, n in tried)
        self.known += len(jobs)
        self.watch(what, self.done, self.known)
        reports = []
        for found in self.runs.map(remembered, jobs):
            reports.append(found)
            self.done += 1
            self.watch(what, self.done, self.known)
        rates = []
        for i in range(len(tried)):
            of = reports[i * len(SEEDS) : (i + 1) * len(SEEDS)]
            arrived = sum(r.arrived for r in of)
            rates.append(sum(r.violation_rate * r.arrived for r in of) / max(arrived, 1))
        return rates


def _at_its_best(name: str, scenario: Scenario) -> System:
    cap = _cap(scenario)
    return system(f"central,slots={cap}" if name == "central" and cap else name)


def _cap(scenario: Scenario) -> int:
    """Sessions that a centralised server holds at once, if fewer than there are devices, else 0."""
    most = round(bound(scenario, central=True).devices)
    return most if 1 <= most < scenario.devices_n else 0


# --- what to say


def _verdict(n: int, ours: Estimate, central: Estimate) -> Verdict:
    if not ours.devices and not central.devices:
        return Verdict.NEITHER
    if central.carries(n):
        return Verdict.ENOUGH
    if ours.carries(n):
        return Verdict.WISP
    if not central.devices:
        return Verdict.MORE
    gain = ours.devices / central.devices
    if not (ours.tried and central.tried):  # then the bounds have to agree
        gain = min(gain, ours.bound / max(central.bound, 1e-9))
    few = ours.servers(n) == central.servers(n)
    return Verdict.NO_GAIN if few or gain < WORTH_IT else Verdict.MORE


def _reasons(scenario: Scenario, verdict: Verdict, ours: Estimate, central: Estimate) -> list[str]:
    n, slo = scenario.devices_n, scenario.slo[0]
    if ours.limit == "context":
        return [
            f"the context is the limit: a prompt and its answer may be {_longest(scenario):,} tokens long, and the "
            f"verifier holds {min(scenario.profile.slot_tokens, scenario.profile.kv_tokens):,} of a session"
        ]
    if ours.limit == "ttft":
        return [
            f"the first token is the limit: for a prompt of {sum(scenario.prompt_tokens) // 2} tokens it takes about "
            f"{_idle_ttft_ms(scenario) / 1e3:.2g} s on an idle verifier, round trip included, and users wait "
            f"{slo.ttft_s:g} s"
        ]
    words = [
        f"at {slo.rate:g} tokens/s, and a first token within {slo.ttft_s:g} s, expect one verifier to carry "
        f"{_number(n, ours)} with WISP and {_number(n, central)} without drafts; you ask for {n}"
    ]
    if any(e.simulated is None and abs(e.devices - n) <= CLOSE * n for e in (ours, central)):
        words.append("that is too close for an estimate: try it with --simulate")
    if ours.limit == "kv":
        words.append("room for KV is what limits it, and drafts do not make any: more memory would")
    elif ours.limit == "slots":
        words.append(
            f"sessions at once, {scenario.profile.slots} by the hardware profile, are what limits it, and drafts do "
            "not change that: more slots would"
        )
    words += _of_drafts(_kept_up(scenario), verdict)
    if verdict is Verdict.ENOUGH and ours.carries(n):
        words.append("WISP would serve them as well, but there is nothing to gain: it is simpler without")
    elif verdict is Verdict.ENOUGH:
        words.append("WISP would not serve as many")
    elif verdict is Verdict.NO_GAIN:
        same = ours.servers(n) == central.servers(n)
        words.append(f"serve them centrally, on {_servers(n, central)}{', as many as with WISP' * same}")
    elif verdict is Verdict.MORE:
        without = (
            f"{_servers(n, central)} without" if central.devices else "no number of them would do without"
        )
        words.append(f"{_servers(n, ours)} with WISP, {without}")
    elif verdict is Verdict.NEITHER:
        words.append("no number of such servers can keep this pace")
    return words


def _number(n: int, e: Estimate) -> str:
    """Devices to expect, and how that is known."""
    if not e.tried:
        return f"about {e.devices} devices"
    return f"{f'at least {n}' if e.carries(n) else f'about {e.devices}'} devices (simulated)"


def _of_drafts(scenario: Scenario, verdict: Verdict) -> list[str]:
    """Of what use drafts are, by how the bound would be reached."""
    best, kit, rate = bound(scenario), scenario.devices[0], scenario.slo[0].rate
    speed = kit.build()[0].tokens_per_s
    slow = f"the devices draft {speed:g} tokens/s, where users expect {rate:g}"
    far = f"a round trip takes {kit.rtt_ms:g} ms, where a token may take {1e3 / rate:.0f}"
    if best.point.sent:
        words = []
        if speed < rate:
            words.append(f"{slow}: drafts help with some of the tokens, and cannot carry the whole stream")
        if kit.rtt_ms > 1e3 / rate:
            words.append(
                f"{far}: a round has to bring several, so drafts are about {best.point.sent:.0f} tokens long"
            )
        return words
    if not best.devices or best.limit != "time":
        return []
    if verdict in (Verdict.WISP, Verdict.MORE):
        return ["it is WISP's scheduling that helps here: drafts hardly do"]
    fast = msgspec.structs.replace(kit, device="10000")
    near = msgspec.structs.replace(kit, rtt_ms=0.0)
    if _pays(scenario, fast):
        why = f"{slow}: too slowly for drafts to be there in time"
    elif _pays(scenario, near):
        why = f"{far}: too long for drafts to pay"
    elif _pays(scenario, msgspec.structs.replace(fast, rtt_ms=0.0)):
        why = f"{slow}, and {far}: drafts come too late"
    else:
        why = "drafts cost more of the verifier's time than they save"
    return [f"{why}; they are best left out"]


def _pays(scenario: Scenario, kit: Kit) -> bool:
    """Would drafting pay with other devices or another link?"""
    return bound(msgspec.structs.replace(scenario, devices=(kit,))).point.sent > 0


def _servers(n: int, e: Estimate) -> str:
    count = e.servers(n)
    return f"{count} server{'s' if count > 1 else ''}"


def _assumed(scenario: Scenario) -> tuple[str, ...]:
    slo, cap = scenario.slo[0], _cap(scenario)
    drafts = (
        f"{scenario.acceptance:.0%} of drafted tokens" if scenario.acceptance else "drafts as recorded ones"
    )
    capped = f" with at most {cap} sessions at once" if cap else ""
    return (
        f"with WISP: batching laxity, drafting gain and ahead, admission by forecast; {drafts} agree with the target; "
        f"clients send x-slo-ttft-ms: {1e3 * slo.ttft_s:g} and x-slo-tpot-ms: {1e3 / slo.rate:.4g}",
        f"centrally: continuous batching of chunked prefill{capped}, nothing refused, no drafts",
    )


def _commands(scenario: Scenario, verdict: Verdict, ours: Estimate, central: Estimate) -> tuple[str, ...]:
    """A line for the servers, and one for the devices. Capitals are for the reader to fill in."""
    if verdict is Verdict.NEITHER:
        return ()
    drafts = verdict in (Verdict.WISP, Verdict.MORE)
    n, profile = scenario.devices_n, scenario.profile
    servers = (ours if drafts else central).servers(n)
    each = math.ceil(n / servers)
    slots = min(profile.slots, each)
    if not drafts:
        slots = _cap(scenario.with_devices(each)) or slots
    serve = ["wisp serve", *_engine(scenario, profile, slots)]
    serve += ["--batching laxity --forecast" if drafts else "--batching continuous --no-forecast"]
    if each > 1024:
        serve.append(f"--max-sessions {each}")
    if servers > 1:
        serve.append(f" # on each of {servers} servers")
    edge = "wisp edge --draft " + ("DRAFT --drafting gain --ahead" if drafts else "none")
    return (" ".join(serve), f"{edge} --server http://SERVER:8100")


def _engine(scenario: Scenario, profile: Hardware, slots: int) -> list[str]:
    if isinstance(profile, Measured):
        of = f"--target {profile.model} --engine {profile.engine}" + f" --mode {profile.mode}" * bool(
            profile.mode
        )
        return [
            of,
            f"--slots {profile.slots} --context {profile.slot_tokens} --cost {shlex.quote(scenario.hardware)}",
        ]
    return ["--target TARGET --engine vllm", f"--slots {slots} --context {_longest(scenario)}"]
