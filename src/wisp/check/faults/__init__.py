"""`wisp check-faults`: whole systems in virtual time under injected faults, each run from one seed.

Routers with replicas, verifiers alone, edges and thin clients are the product's own code, down to the sessions' loops.
Clocks, threads, sockets and chance are the simulation's, so a run is a function of its seed, and a failure can be run
again, and made shorter.

    loop      processes in virtual time, that freeze and die
    lines     connections that stall and break; network: all of them; sockets: their ends for the product's code
    engine    a target whose text shows any slip, and drafters for it
    nodes     verifiers, routers, edges
    users     ask, and check each token
    peers     an edge of the release before, and hostile ones
    plan      the events of a run, drawn from a seed or read from a file
    faults    one function for each kind of fault
    oracles   the conditions that must hold
    world     all of them together
    shrink    making a plan that fails shorter
    check     many seeds
"""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from wisp.check.faults.check import Report, check
from wisp.check.faults.plan import plan_of
from wisp.check.faults.shrink import read_case, shrink, write_case
from wisp.check.faults.world import run_plan
from wisp.core.errors import ConfigError
from wisp.outputs import writable
from wisp.progress import progress_bar

SHOWN = 10  # violations printed


def run_check(
    *,
    first: int,
    seeds: int,
    minutes: float,
    jobs: int,
    resume: Path | None,
    out: Path | None,
    as_json: bool,
) -> int:
    """Check, print, and return the exit status: 0 if nothing was found. `resume`: see `check`.

    The first plan that fails is made shorter and written to `out` (default: a file named after its seed), unless that
    is there from an earlier part and still fails.
    """
    for path in (out, resume):
        if path is not None:
            writable(path)
    with progress_bar() as tell:
        report = check(first, seeds, minutes=minutes, jobs=jobs, resume=resume, tell=tell)
    written = None
    if report.violations:
        seed = min(report.violations)
        written = out or Path(f"faults-{seed}.json")
        if resume is None or not _fails(written, seed):
            plan = plan_of(seed)
            found = run_plan(plan).found
            assert found is not None, "the same seed gives the same run"
            write_case(written, shrink(plan, found), found)
    if as_json:
        flat = {**msgspec.structs.asdict(report), "passed": report.passed}
        print(msgspec.json.encode({**flat, "written": str(written or "")}).decode())
    else:
        _show(report, written)
    return 0 if report.passed else 1


def _fails(path: Path, seed: int) -> bool:
    """Does the file have a plan of this seed that fails?"""
    try:
        plan = read_case(path)
    except ConfigError:
        return False
    return plan.seed == seed and run_plan(plan).found is not None


def replay(path: Path, *, as_json: bool) -> int:
    """Run the plan in a file once. The exit status is 0 if nothing was found."""
    outcome = run_plan(read_case(path))
    if as_json:
        print(msgspec.json.encode(outcome).decode())
    elif outcome.found is None:
        print(f"passed: {sum(outcome.faults.values())} faults, {outcome.tokens} tokens")
    else:
        print(f"FAILED at {outcome.found.at:.6f} s: {outcome.found.what}")
    return 0 if outcome.found is None else 1


def _show(report: Report, written: Path | None) -> None:
    table = Table(title=f"check-faults: seeds from {report.first_seed} on", show_header=False)
    rate = report.faults / report.cpu_s if report.cpu_s else 0.0
    rows: dict[str, object] = {
        "seeds": report.seeds,
        "faults": report.faults,
        "requests": report.requests,
        "tokens compared": report.tokens,
        "violations": len(report.violations),
        "virtual hours": f"{report.virtual_s / 3600:.1f}",
        "CPU seconds": f"{report.cpu_s:.0f} ({rate:.0f} faults a second)",
    }
    rows |= {f"fault: {name}": n for name, n in sorted(report.by_kind.items())}
    rows |= {f"seen: {name}": n for name, n in sorted(report.by_situation.items())}
    rows |= {f"request: {name}": n for name, n in sorted(report.by_outcome.items())}
    for name, value in rows.items():
        table.add_row(name, str(value))
    console = Console()
    console.print(table)
    for seed, what in list(report.violations.items())[:SHOWN]:
        console.print(f"seed {seed}: {what}", style="red", markup=False)
    if written is not None:
        print(
            f"Made shorter in {written}; wisp check-faults --replay {written} runs it again.", file=sys.stderr
        )
    print("passed" if report.passed else "FAILED", file=sys.stderr)
