"""The advice, its reasons and its commands. All follow from the estimated or simulated numbers of devices."""

from __future__ import annotations

import math
import shlex
from enum import StrEnum

import msgspec

from wisp.calibrate.hardware import Measured
from wisp.engines.emulated import Hardware
from wisp.sim.fluid import bound
from wisp.sim.plan.estimate import Estimate, cap, idle_ttft_ms, kept_up, longest
from wisp.sim.scenario import Kit, Scenario

WORTH_IT = 1.1  # a gain in devices below this factor is not worth a drafter on each
CLOSE = 0.15  # relative distance within which an estimate decides nothing


class Verdict(StrEnum):
    """The advice."""

    WISP = "use WISP"
    MORE = "use WISP, on more than one verifier"
    ENOUGH = "serve centrally: one server carries all of them without drafts"
    NO_GAIN = "serve centrally: it takes as many servers with drafts, or nearly as many"
    NEITHER = "neither: this verifier cannot serve such users, with or without drafts"


def decide(n: int, wisp: Estimate, central: Estimate) -> Verdict:
    """For `n` devices."""
    if not wisp.devices and not central.devices:
        return Verdict.NEITHER
    if central.carries(n):
        return Verdict.ENOUGH
    if wisp.carries(n):
        return Verdict.WISP
    if not central.devices:
        return Verdict.MORE
    gain = wisp.devices / central.devices
    if not (wisp.tried and central.tried):  # then the bounds have to agree
        gain = min(gain, wisp.bound / max(central.bound, 1e-9))
    few = wisp.servers(n) == central.servers(n)
    return Verdict.NO_GAIN if few or gain < WORTH_IT else Verdict.MORE


def reasons(scenario: Scenario, verdict: Verdict, wisp: Estimate, central: Estimate) -> list[str]:
    n, slo = scenario.devices_n, scenario.slo[0]
    if wisp.limit == "context":
        return [
            f"the context is the limit: a prompt and its answer may be {longest(scenario):,} tokens long, and the "
            f"verifier holds {min(scenario.profile.slot_tokens, scenario.profile.kv_tokens):,} of a session"
        ]
    if wisp.limit == "ttft":
        return [
            f"the first token is the limit: for a prompt of {sum(scenario.prompt_tokens) // 2} tokens it takes about "
            f"{idle_ttft_ms(scenario) / 1e3:.2g} s on an idle verifier, round trip included, and users wait "
            f"{slo.ttft_s:g} s"
        ]
    words = [
        f"at {slo.rate:g} tokens/s, and a first token within {slo.ttft_s:g} s, expect one verifier to carry "
        f"{_number(n, wisp)} with WISP and {_number(n, central)} without drafts; you ask for {n}"
    ]
    guessed = any(e.simulated is None for e in (wisp, central))
    near = any(e.simulated is None and abs(e.devices - n) <= CLOSE * n for e in (wisp, central))
    possible = {Verdict.NO_GAIN: WORTH_IT * central.bound, Verdict.NEITHER: 1.0}.get(verdict, math.inf)
    if near or (guessed and wisp.bound >= possible):  # the bound and the estimate disagree
        words.append("that is too close for an estimate: try it with --simulate")
    if wisp.limit == "kv":
        words.append("room for KV is what limits it, and drafts do not make any: more memory would")
    elif wisp.limit == "slots":
        words.append(
            f"sessions at once, {scenario.profile.slots} by the hardware profile, are what limits it, and drafts do "
            "not change that: more slots would"
        )
    if verdict is not Verdict.NEITHER:
        words += _of_drafts(kept_up(scenario), verdict)
    if verdict is Verdict.ENOUGH and wisp.carries(n):
        words.append("WISP would serve them as well, but there is nothing to gain: it is simpler without")
    elif verdict is Verdict.ENOUGH:
        words.append("WISP would not serve as many")
    elif verdict is Verdict.NO_GAIN:
        same = wisp.servers(n) == central.servers(n)
        words.append(f"serve them centrally, on {_servers(n, central)}{', as many as with WISP' * same}")
    elif verdict is Verdict.MORE:
        without = (
            f"{_servers(n, central)} without" if central.devices else "no number of them would do without"
        )
        words.append(f"{_servers(n, wisp)} with WISP, {without}")
    elif verdict is Verdict.NEITHER:
        sure = wisp.bound < 1 or not guessed
        words.append(f"no number of such servers {'can' if sure else 'is expected to'} keep this TPOT target")
    return words


def _number(n: int, e: Estimate) -> str:
    """Devices to expect, and how that is known."""
    tried = " (simulated)" if e.tried else ""
    if e.tried and e.carries(n):
        return f"at least {n} device{'s' * (n != 1)}{tried}"
    return f"about {e.devices} device{'s' * (e.devices != 1)}{tried}"


def _of_drafts(scenario: Scenario, verdict: Verdict) -> list[str]:
    """The use of drafts, by the way in which the bound would be reached."""
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


def assumed(scenario: Scenario) -> tuple[str, ...]:
    slo, most = scenario.slo[0], cap(scenario)
    drafts = (
        f"{scenario.acceptance:.0%} of drafted tokens" if scenario.acceptance else "drafts as recorded ones"
    )
    capped = f" with at most {most} sessions at once" if most else ""
    return (
        f"with WISP: batching wisp, drafting gain and ahead, SLO admission; {drafts} agree with the target; "
        f"clients send x-slo-ttft-ms: {1e3 * slo.ttft_s:g} and x-slo-tpot-ms: {1e3 / slo.rate:.4g}",
        f"centrally: continuous batching of chunked prefill{capped}, nothing refused, no drafts",
        *_overlap(scenario.profile),
    )


def _overlap(profile: Hardware) -> tuple[str, ...]:
    """The overlap, and those that measurements allow. More overlap: drafts gain less."""
    if profile.overlap_measured is None:
        return ()
    return (
        f"a step's reading and arithmetic overlap with p = {overlap_told(profile)}: with more overlap both ways carry "
        "more, and WISP's lead is smaller (docs/results/overlap.md)",
    )


def overlap_told(profile: Hardware) -> str:
    """A profile's overlap beside those that measurements allow; "" if none are known."""
    if profile.overlap_measured is None:
        return ""
    least, likeliest, most = profile.overlap_measured
    which = "the likeliest" if profile.overlap == likeliest else f"where {likeliest:g} is likeliest"
    return f"{profile.overlap:g}, {which}; measurements allow {least:g} to {most:g}"


def commands(scenario: Scenario, verdict: Verdict, wisp: Estimate, central: Estimate) -> tuple[str, ...]:
    """A line for the servers, and one for the devices. Capitals are for the reader to fill in."""
    if verdict is Verdict.NEITHER:
        return ()
    drafts = verdict in (Verdict.WISP, Verdict.MORE)
    n, profile = scenario.devices_n, scenario.profile
    servers = (wisp if drafts else central).servers(n)
    each = math.ceil(n / servers)
    slots = min(profile.slots, each)
    if not drafts:
        slots = cap(scenario.with_devices(each)) or slots
    serve = ["wisp serve", *_engine(scenario, profile, slots)]
    serve += ["--batching wisp --slo-admission" if drafts else "--batching continuous --no-slo-admission"]
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
    return ["--target TARGET --engine vllm", f"--slots {slots} --context {longest(scenario)}"]
