"""More requests than the verifiers can serve: by honest customers, and by one key that takes no refusal for an answer.

Requests come at random times at a given rate, whether the earlier ones have ended or not. 1x is the rate at which the
same verifiers served customers that each ask when they have their answer, as many as they can keep the pace for. Every
request has an SLO. One that was refused is not asked again: at the given rate another comes.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterable
from pathlib import Path

import msgspec

from benchmarks.soak.http import Line
from benchmarks.soak.measure import quantile
from benchmarks.soak.parties import Tally
from benchmarks.soak.stack import GREEDY, HONEST, PATIENCE_S, REPLICAS, Door, a_key
from benchmarks.soak.texts import Jobs
from wisp.core.protocol.slo import Slo

SLOTS, KV_TOKENS = 64, 16_384  # of each verifier: time is what is short
STEP_MS, SLICE_MS = 40.0, 4.0  # so slow that clients and processes get by with a part of two busy cores
FULL = 24  # sessions of a verifier at 1x: 136 ms a step
TOKENS = 48
SLO = Slo(ttft_ms=2000.0, tpot_ms=160.0)
HEADERS = f"x-slo-ttft-ms: {SLO.ttft_ms:g}\r\nx-slo-tpot-ms: {SLO.tpot_ms:g}\r\n"
HONEST_SHARE = 0.5  # of 1x, beside the greedy key


class Cell(msgspec.Struct):
    """One load. `offered`: of 1x. attainment: of admitted requests; goodput: tokens per second of those in time."""

    load: str
    offered: float
    seconds: float
    arrived: int = 0
    admitted: int = 0
    met: int = 0
    late_first: int = 0  # admitted ones that missed their TTFT
    late_after: int = 0  # likewise their TPOT
    refused: dict[str, int] = {}
    attainment: float = 0.0
    goodput: float = 0.0
    ttft_p99_ms: float = 0.0
    tpot_p99_ms: float = 0.0
    late_p99_ms: float = 0.0  # of the clients' own event loop


class Outcome(msgspec.Struct, frozen=True):
    """One request: when it came (s), whose it was, what it was refused with, and how it went."""

    at: float
    key: str
    refused: str
    ttft_ms: float = 0.0
    tpot_ms: float = 0.0
    tokens: int = 0

    @property
    def met(self) -> bool:
        return not self.refused and self.ttft_ms <= SLO.ttft_ms and self.tpot_ms <= SLO.tpot_ms


def profile(path: Path) -> Path:
    """A hardware profile of verifiers that are slow for all but their customers. Returns its path."""
    path.write_text(hardware(STEP_MS, SLICE_MS, SLOTS, KV_TOKENS))
    return path


def hardware(step_ms: float, slice_ms: float, slots: int, kv_tokens: int) -> str:
    """A profile whose steps take that long, whatever is in them, as TOML."""
    return (
        'about = "steps of a fixed time, for soaks"\nparameters = 1e-6\nlayers = 1\nheads = 1\nkv_heads = 1\n'
        "head_dim = 1\nbandwidth = 1e6\ntflops = 1e6\nnoise = 0.03\nstraggle = 0.005\n"
        f"launch_ms = {step_ms}\nsequence_ms = {slice_ms}\nslots = {slots}\nkv_tokens = {kv_tokens}\n"
    )


class Crowd:
    """Requests at one door, checked like all others."""

    def __init__(self, door: Door, jobs: Jobs, tally: Tally, chance: random.Random) -> None:
        self._door = door
        self._jobs = jobs
        self._tally = tally
        self._chance = chance
        self._lines: dict[str, list[Line]] = {}  # that nobody uses, by key
        self.outcomes: list[Outcome] = []
        self.lags_ms: list[float] = []

    async def closed(self, seconds: float) -> float:
        """Customers that each ask again when they have their answer. Returns requests per second."""
        began = time.monotonic()

        async def one() -> int:
            count = 0
            while time.monotonic() < began + seconds:
                await self._ask(a_key(self._chance), 0.0, "")
                count += 1
            return count

        counts = await asyncio.gather(*(one() for _ in range(FULL * REPLICAS)))
        return sum(counts) / (time.monotonic() - began)  # to the end of the last

    async def open(self, rates: dict[str, float], seconds: float) -> None:
        """Requests of each key at its rate (per second), for so long, and then to their end."""
        began = time.monotonic()
        asked: set[asyncio.Task[None]] = set()
        for at, key in sorted(arrivals(rates, seconds, self._chance)):
            await asyncio.sleep(max(0.0, began + at - time.monotonic()))
            self.lags_ms.append(max(0.0, time.monotonic() - began - at) * 1e3)
            task = asyncio.create_task(self._ask(key, at, HEADERS))
            asked.add(task)
            task.add_done_callback(asked.discard)
        await asyncio.gather(*asked)

    async def _ask(self, key: str, at: float, headers: str) -> None:
        spare = self._lines.setdefault(key, [])
        line = spare.pop() if spare else Line(self._door.port, key)
        job = self._jobs(self._chance, TOKENS)
        try:
            async with asyncio.timeout(PATIENCE_S):
                said = await line.complete(job, stream=True, headers=headers)
        except (OSError, EOFError) as error:
            self._tally.lost += 1
            self._tally.find(f"under load: {error!r}")
            return
        spare.append(line)
        self._tally.judge(job, said.text, whole=not said.error, who="under load")
        if said.error:
            self._tally.refused[said.error] += 1
            if said.status not in (429, 503):
                self._tally.lost += 1
                self._tally.find(f"under load: {said.status} {said.error}: {said.about}")
            self.outcomes.append(Outcome(at, key, said.error))
            return
        self._tally.sessions[self._door.name] += 1
        self._tally.tokens += TOKENS
        tpot_ms = (said.last_s - said.first_s) * 1e3 / (TOKENS - 1)
        self.outcomes.append(Outcome(at, key, "", said.first_s * 1e3, tpot_ms, TOKENS))

    def close(self) -> None:
        for line in (line for spare in self._lines.values() for line in spare):
            line.close()


def arrivals(rates: dict[str, float], seconds: float, chance: random.Random) -> Iterable[tuple[float, str]]:
    """Times and keys: of each key at random, at its rate."""
    for key, rate in rates.items():
        at = chance.expovariate(rate)
        while at < seconds:
            yield at, key
            at += chance.expovariate(rate)


def cell(load: str, offered: float, seconds: float, warm_s: float, crowd: Crowd, keys: Iterable[str]) -> Cell:
    """What became of the requests of these keys that came after `warm_s`."""
    keys = set(keys)
    some = [o for o in crowd.outcomes if o.key in keys and o.at >= warm_s]
    admitted = [o for o in some if not o.refused]
    met = [o for o in admitted if o.met]
    refused = sorted({o.refused for o in some} - {""})
    return Cell(
        load,
        offered,
        seconds - warm_s,
        len(some),
        len(admitted),
        len(met),
        sum(o.ttft_ms > SLO.ttft_ms for o in admitted),
        sum(o.tpot_ms > SLO.tpot_ms for o in admitted),
        {code: sum(o.refused == code for o in some) for code in refused},
        round(len(met) / len(admitted), 4) if admitted else 0.0,
        round(sum(o.tokens for o in met) / (seconds - warm_s), 1),
        round(quantile([o.ttft_ms for o in admitted], 0.99), 1),
        round(quantile([o.tpot_ms for o in admitted], 0.99), 1),
        round(quantile(crowd.lags_ms, 0.99), 1),
    )


async def overload(
    door: Door, jobs: Jobs, tally: Tally, chance: random.Random, seconds: float
) -> tuple[float, list[Cell]]:
    """1x in requests per second, and what became of 1x, 2x and 5x by honest keys, and of 2x and 5x by a greedy one."""
    crowd = Crowd(door, jobs, tally, chance)
    await crowd.closed(seconds / 6)  # the cost models learn
    one = await crowd.closed(seconds / 3)
    crowd.close()
    warm_s = seconds / 4
    cells = []
    for times in (1.0, 2.0, 5.0):
        crowd = Crowd(door, jobs, tally, chance)
        await crowd.open({key: one * times / len(HONEST) for key in HONEST}, seconds)
        cells.append(cell("honest keys", times, seconds, warm_s, crowd, HONEST))
        crowd.close()
    for times in (2.0, 5.0):
        crowd = Crowd(door, jobs, tally, chance)
        rates = {key: one * HONEST_SHARE / len(HONEST) for key in HONEST}
        await crowd.open(rates | {GREEDY: one * (times - HONEST_SHARE)}, seconds)
        cells.append(cell("a greedy key and honest ones", times, seconds, warm_s, crowd, {*HONEST, GREEDY}))
        cells.append(cell("of these, the honest ones", times, seconds, warm_s, crowd, HONEST))
        crowd.close()
    return round(one, 2), cells
