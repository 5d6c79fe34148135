"""`wisp check-lossless`: compares texts with speculation, under faults, with the target's own.

Two real `Verifier`s on a real engine, and real `Drafter`s, run in one process and in virtual time. Sessions share
a few KV slots, connections break and come back, verifiers are replaced or take turns, users leave, frames are
repeated, overtaken and senseless. Every token is compared with that of a slow decoder without drafts.
For the tiny pair one ordinary token is an end of sequence too, so that many texts end that way.

    judge        the text of the target alone, and comparison with it
    cases        prompts x samplings x drafters x batching policies
    drafts       drafters that are always wrong, always right, random, empty
    world, edge  the verifiers with their engine, and devices with their sessions
    fleet        all of them together
    chi_square   are sampled tokens distributed as they should be?
    check        puts it together
"""

from __future__ import annotations

import math
import sys

import msgspec
from rich.console import Console
from rich.table import Table

from wisp.check.lossless.cases import REAL, TINY
from wisp.check.lossless.check import Bench, Report, check
from wisp.engines.models import RichProgress
from wisp.progress import progress_bar

SHOWN = 20  # findings printed in full


def run_check(
    pair: str,
    *,
    engine: str = "llama.cpp",
    mode: str | None = None,
    cases: int | None,
    seed: int,
    depth: int | None = None,
    offline: bool,
    as_json: bool,
) -> int:
    """Check, print, and return the exit status: 0 if nothing was found (and, in exact mode, no tie)."""
    scale = TINY if pair == "tiny" else REAL
    mode = mode or ("exact" if engine == "llama.cpp" else "fast")
    with RichProgress() as progress:
        bench = Bench(pair, mode, scale, engine=engine, offline=offline, progress=progress)
    try:
        with progress_bar() as tell:
            report = check(bench, mode=mode, cases=cases or scale.cases, seed=seed, depth=depth, tell=tell)
    finally:
        bench.close()
    if as_json:
        print(msgspec.json.encode(_flat(report)).decode())
    else:
        _show(report)
    return 0 if report.passed else 1


def _flat(report: Report) -> dict[str, object]:
    """For JSON: counts beside the verdict, and only the first of many findings."""
    out: dict[str, object] = msgspec.structs.asdict(report)
    out.update(report.counts)
    del out["counts"]
    out["findings"] = [
        {**msgspec.structs.asdict(f), "gap": None if math.isinf(f.gap) else f.gap}
        for f in report.findings[:SHOWN]
    ]
    out["passed"] = report.passed
    return out


def _show(report: Report) -> None:
    table = Table(title=f"check-lossless: {report.pair}, {report.mode} mode", show_header=False)
    rows: dict[str, object] = {
        "cases": report.cases,
        "identical": report.identical,
        "ties": report.ties,
        "mismatches": report.mismatches,
        "tokens compared": report.tokens,
        "acceptance": f"{report.acceptance:.3f}",
    }
    rows |= {name.replace("_", " "): count for name, count in report.counts.items()}
    if report.chi_square is not None:
        rows["chi-square"] = f"p = {report.chi_square.p:.3g}, {report.chi_square.samples} samples"
    rows["seconds"] = report.seconds
    for name, value in rows.items():
        table.add_row(name, str(value))
    console = Console()
    console.print(table)
    for finding in report.findings[:SHOWN]:
        console.print(finding, style="yellow" if finding.tie else "red")
    for line in [*report.trouble, *(f"never happened: {name}" for name in report.missing)]:
        console.print(line, style="red", markup=False)
    print("passed" if report.passed else "FAILED", file=sys.stderr)
