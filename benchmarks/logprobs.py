"""`python -m benchmarks logprobs`: what one client that asks for 20 log probabilities costs 63 others.

Two lots of 64 sessions on one verifier and engine take steps in turn; in the second, one session has log probabilities.
A step's thread CPU counts from its drafts to the bytes of its verdicts. On the emulated engine the device's time is
that of the profile; on vLLM (CPU, tiny model) the forward pass is part of the step. Choosing alone is measured once
more with a vocabulary of 151,936 ids, where log probabilities cost most.
"""

from __future__ import annotations

import datetime
import os
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from wisp.core.protocol.messages import Draft, Open, Verdict, encode
from wisp.core.protocol.sampling import Sampling
from wisp.core.verify.admission import Admission
from wisp.core.verify.batching import batching_policy
from wisp.core.verify.cost import load_of
from wisp.core.verify.events import Limits, Received, Run, Send, StepDone, Tick
from wisp.core.verify.verifier import Verifier
from wisp.engines.emulated import EmulatedTarget, hardware
from wisp.outputs import writable

SESSIONS, TOP, DRAFT = 64, 20, 4
WARM, STEPS = 6, 60
PROMPT, CONTEXT = 24, 512  # tokens
LONGEST = CONTEXT - PROMPT - DRAFT - 2  # of an answer
PROFILE = "h200-qwen3-8b"
VOCABULARY, LIKELY = 151_936, 40  # ids, and those of each row that stand out, as a model's do
HOW = Sampling(temperature=0.7, top_p=0.95)


class Rise(msgspec.Struct):
    """Of a step of 64: medians, ms; host is thread CPU. rise: of the step, by the one client; low, high: its quartiles
    over steps that followed each other."""

    engine: str
    device_ms: float
    host_ms: float
    host_with_ms: float
    rise: float
    low: float
    high: float


class House:
    """A verifier over an engine, without sockets. `choose`: runs a step's slices."""

    def __init__(self, engine: Any, choose: Callable[[Any], Any], ids: int) -> None:
        info = engine.info
        limits = Limits(
            info.n_vocab, info.eos, info.slots, info.slot_tokens, info.kv_tokens, info.step_tokens
        )
        self.verifier = Verifier(limits, batching_policy("wisp"), Admission(2 * SESSIONS + 1))
        self.engine, self.choose, self.ids = engine, choose, ids
        self.now, self.device_ms = 0.0, 0.0
        self.said: dict[str, int] = {}
        self.rounds: dict[str, int] = {}
        self.lots = [[f"{lot}-{i}" for i in range(SESSIONS)] for lot in ("without", "with")]
        for lot, names in enumerate(self.lots):
            for i, name in enumerate(names):
                prompt = [random.Random(name).randrange(ids) for _ in range(PROMPT)]
                how = msgspec.structs.replace(HOW, seed=i)
                top = TOP if lot and not i else None
                opening = Open(name, 1, prompt, how, LONGEST, ignore_eos=True, logprobs=top)
                if refused := self.verifier.handle(self.now, Received(1, "", opening)):
                    raise AssertionError(f"a session was not taken: {refused}")
                self.said[name], self.rounds[name] = 0, 1
            while not all(self.said[name] for name in names):
                self.advance()

    def step(self, lot: int) -> float:
        """One step of a lot; thread CPU, ms."""
        rng = random.Random(self.now)
        drafts = [
            Draft(name, self.rounds[name], self.said[name], [rng.randrange(self.ids) for _ in range(DRAFT)])
            for name in self.lots[lot]
        ]
        begun = time.thread_time()
        for draft in drafts:
            self.verifier.handle(self.now, Received(1, "", draft))
        self.advance()
        return (time.thread_time() - begun) * 1e3

    def advance(self) -> None:
        self.now += 0.05
        for action in self.verifier.handle(self.now, Tick()):
            if isinstance(action, Run):
                for copy in action.copies:
                    self.engine.copy(copy)
                done = StepDone(self.choose(action.slices), 20.0)
                if isinstance(self.engine, EmulatedTarget):
                    self.device_ms = self.engine.profile.step_ms(load_of(action.slices))
                for sent in self.verifier.handle(self.now, done):
                    if isinstance(sent, Send) and isinstance(sent.message, Verdict):
                        self._note(sent.message)

    def _note(self, verdict: Verdict) -> None:
        encode(verdict)
        self.said[verdict.session] = verdict.base + len(verdict.tokens)
        self.rounds[verdict.session] = verdict.round + 1


def in_turn(engine: str, step: Callable[[int], float], device_ms: Callable[[], float], steps: int) -> Rise:
    """`step(0)` without and `step(1)` with the client, each first as often as the other."""
    pairs: list[tuple[float, float]] = []
    for i in range(WARM + steps):
        first, second = (0, 1) if i % 2 else (1, 0)
        ms = {first: step(first)}
        ms[second] = step(second)
        if i >= WARM:
            pairs.append((ms[0], ms[1]))
    device = device_ms()
    rises = [(b - a) / (a + device) for a, b in pairs]
    low, middle, high = statistics.quantiles(rises, n=4)
    without, with_ = (statistics.median(side) for side in zip(*pairs, strict=True))
    return Rise(engine, *(round(x, 4) for x in (device, without, with_, middle, low, high)))


def emulated() -> Rise:
    """On the profile's device."""
    engine = EmulatedTarget(PROFILE, hardware(PROFILE), n_vocab=VOCABULARY, eos=frozenset({VOCABULARY - 1}))
    house = House(engine, engine.choose, VOCABULARY - 1)
    return in_turn(f"emulated, {PROFILE}", house.step, lambda: house.device_ms, STEPS)


def vllm() -> Rise:
    """On vLLM's CPU build, with the tiny model. Raises WispError."""
    from wisp.engines.vllm.models import fetched
    from wisp.engines.vllm.starting import Wanted
    from wisp.engines.vllm.target import VllmTarget

    folder = str(fetched("tiny-target", offline=True))
    wanted = Wanted(
        model=folder,
        slots=2 * SESSIONS,
        slot_tokens=CONTEXT,
        threads=1,
        offline=True,
        step_tokens=5 * SESSIONS,
    )
    engine = VllmTarget(wanted, name="tiny-target", eos=[])

    def all_of_it() -> Rise:
        house = House(engine, engine.run, 256)
        return in_turn("vLLM on a CPU, tiny model", house.step, lambda: 0.0, STEPS)

    try:
        return engine.inside(all_of_it)
    finally:
        engine.close()


def choosing(steps: int = 8) -> Rise:
    """The choice of 64 tokens from 151,936 ids each, by the rule on a CPU."""
    import torch

    from wisp.engines.vllm.choosing import choose
    from wisp.engines.vllm.parts import Part

    source = torch.Generator().manual_seed(1)
    logits = torch.randn((SESSIONS, VOCABULARY), generator=source)
    likely = torch.randint(VOCABULARY, (SESSIONS, LIKELY), generator=source)
    logits.scatter_add_(1, likely, 20 + 3 * torch.randn(likely.shape, generator=source))
    lots = [
        [
            Part([], True, 7, msgspec.structs.replace(HOW, seed=i), TOP if lot and not i else None)
            for i in range(SESSIONS)
        ]
        for lot in (0, 1)
    ]

    def step(lot: int) -> float:
        begun = time.thread_time()
        choose(logits, lots[lot], here=True)
        return (time.thread_time() - begun) * 1e3

    return in_turn(f"choice alone, {VOCABULARY} ids", step, lambda: 0.0, steps)


def run_bench_logprobs(out: Path | None, *, as_json: bool) -> None:
    """Measure, print, and write `out`. Without vLLM its rows are left out. Raises WispError."""
    from importlib.util import find_spec

    if out is not None:
        writable(out)
    rows = [emulated()]
    if find_spec("vllm") is not None:
        rows += [vllm(), choosing()]
    result = {
        "command": "python -m benchmarks logprobs",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "sessions": SESSIONS,
        "alternatives": TOP,
        "rows": rows,
        "load": round(os.getloadavg()[1], 1),
    }
    if out is not None:
        out.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")
    if as_json:
        print(msgspec.json.encode(result).decode())
        return
    table = Table("engine", "device ms", "host ms", "with the client", "rise (quartiles)")
    for r in rows:
        rise = f"{r.rise:+.2%} ({r.low:+.2%} to {r.high:+.2%})"
        table.add_row(r.engine, f"{r.device_ms:.2f}", f"{r.host_ms:.2f}", f"{r.host_with_ms:.2f}", rise)
    Console().print(table)
