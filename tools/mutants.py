"""Mutants of the verifier's heart: small changes to its source, each of which some test should notice.

    python -m tools.mutants --bin FOLDER [--count 500] [--seed 1] [--minutes 60] [--out docs/results/mutants.json]

cosmic-ray makes all of them and runs the tests; here some are picked by seed, and what came of them is written down.
A run that was cut short goes on where it stopped. All of it happens in a copy of the tree, as cosmic-ray changes files.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

FOLDER = Path("build/mutants")
MODULES = tuple(f"src/wisp/core/verify/{name}.py" for name in ("verifier", "session", "kv"))
# The tests of `core` that reach these modules, the quickest first: most mutants end at the first.
TESTS = tuple(
    f"tests/core/test_{name}.py"
    for name in (
        "kv",
        "session",
        "verifier",
        "places",
        "preemption",
        "bookkeeping",
        "loop",
        "slo_admission",
        "protocol",
    )
)
COPIED = ("src", "tests/core", "tests/conftest.py", "tests/waiting.py", "pyproject.toml", "docs/protocol.md")
CPU_S = 120  # of the tests of one mutant: what takes more never ends
WALL_S = 3600.0  # for the same on a busy machine

Record = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    about = argparse.ArgumentParser(prog="mutants")
    about.add_argument("--bin", type=Path, required=True, help="where cosmic-ray is")
    about.add_argument("--python", type=Path, default=Path(sys.executable), help="what runs the tests")
    about.add_argument("--count", type=int, default=500)
    about.add_argument("--seed", type=int, default=1)
    about.add_argument(
        "--minutes", type=float, default=0.0, help="stop after that long, to go on another time"
    )
    about.add_argument("--out", type=Path, default=Path("docs/results/mutants.json"))
    given = about.parse_args(arguments)
    cosmic_ray = (given.bin / "cosmic-ray").absolute()
    tree = FOLDER.absolute() / "tree"
    session = FOLDER.absolute() / f"{given.count}-{given.seed}.sqlite"
    config = FOLDER.absolute() / "cosmic-ray.toml"
    fresh_copy(tree)
    config.write_text(configuration(given.python.absolute()))
    if not session.exists():
        subprocess.run([cosmic_ray, "init", config, session], cwd=tree, check=True)
        with closing(sqlite3.connect(session)) as db:
            pick(db, given.count, given.seed)
    subprocess.run([cosmic_ray, "baseline", config], cwd=tree, check=True)  # the tests pass without a mutant
    carry_out([cosmic_ray, "exec", config, session], tree, given.minutes)
    with closing(sqlite3.connect(session)) as db:
        records = list(read(db))
    summary = summed(records, given.count, given.seed)
    given.out.write_text(json.dumps(summary, indent=1) + "\n")
    given.out.with_suffix(".md").write_text(page(summary))
    print(
        f"{summary['killed']} of {summary['done']} killed ({summary['share']:.1%}); {summary['left']} to do"
    )
    return 0


def fresh_copy(tree: Path) -> None:
    """What the tests need, as it is now: a run that was cut short may have left a mutant there."""
    shutil.rmtree(tree, ignore_errors=True)
    for name in COPIED:
        to = tree / name
        to.parent.mkdir(parents=True, exist_ok=True)
        if Path(name).is_dir():
            shutil.copytree(name, to, ignore=shutil.ignore_patterns("__pycache__", "*.gguf"))
        else:
            shutil.copy(name, to)


def configuration(python: Path) -> str:
    """For cosmic-ray. The limit on CPU time ends mutants that never end, however busy the machine is."""
    run = f"{python} -m pytest -x -q -p no:cacheprovider {' '.join(TESTS)}"
    command = f"sh -c 'ulimit -t {CPU_S}; PYTHONPATH=src:. PYTHONDONTWRITEBYTECODE=1 exec {run}'"
    modules = ", ".join(f'"{module}"' for module in MODULES)
    return (
        f"[cosmic-ray]\nmodule-path = [{modules}]\ntimeout = {WALL_S}\nexcluded-modules = []\n"
        f'test-command = "{command}"\n\n[cosmic-ray.distributor]\nname = "local"\n'
    )


def pick(db: sqlite3.Connection, count: int, seed: int) -> None:
    """Keep `count` of all mutants, by seed; in an order of chance, so that a part of a run is a fair sample, too."""
    rows = db.execute(
        "SELECT job_id FROM mutation_specs "
        "ORDER BY module_path, start_pos_row, start_pos_col, operator_name, operator_args, occurrence"
    )
    jobs = [job for (job,) in rows]
    chosen = random.Random(seed).sample(jobs, min(count, len(jobs)))
    kept = set(chosen)
    for job in jobs:
        if job not in kept:
            db.execute("DELETE FROM mutation_specs WHERE job_id = ?", (job,))
            db.execute("DELETE FROM work_items WHERE job_id = ?", (job,))
    db.commit()


def carry_out(command: Sequence[str | Path], tree: Path, minutes: float) -> None:
    """Run it, for at most so long (0: to its end), in a process group of its own."""
    deadline = time.monotonic() + minutes * 60.0 if minutes else float("inf")
    process = subprocess.Popen(command, cwd=tree, process_group=0)
    try:
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(1.0)
    finally:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
            process.wait()


def read(db: sqlite3.Connection) -> Iterator[Record]:
    """What came of each mutant; outcome None: nothing yet."""
    rows = db.execute(
        "SELECT m.module_path, m.operator_name, m.start_pos_row, m.definition_name, r.test_outcome, r.diff "
        "FROM mutation_specs m LEFT JOIN work_results r ON m.job_id = r.job_id "
        "ORDER BY m.module_path, m.start_pos_row, m.operator_name, m.occurrence"
    )
    for path, operator, line, where, outcome, diff in rows:
        yield {
            "file": Path(path).name,
            "line": line,
            "in": where,
            "operator": operator.removeprefix("core/"),
            "outcome": str(outcome).rpartition(".")[2].lower() if outcome is not None else None,
            "diff": [
                part
                for part in (diff or "").splitlines()
                if part[:1] in "+-" and part[:3] not in ("+++", "---")
            ],
        }


def summed(records: Sequence[Record], count: int, seed: int) -> Record:
    done = [r for r in records if r["outcome"] is not None]
    survivors = [r for r in done if r["outcome"] == "survived"]
    files = {
        name: {
            "mutants": sum(r["file"] == name for r in done),
            "killed": sum(r["file"] == name and r["outcome"] != "survived" for r in done),
        }
        for name in sorted({r["file"] for r in done})
    }
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "command": f"make mutants (python -m tools.mutants --count {count} --seed {seed})",
        "tests": list(TESTS),
        "seed": seed,
        "mutants": len(records),
        "done": len(done),
        "left": len(records) - len(done),
        "killed": len(done) - len(survivors),
        "share": (len(done) - len(survivors)) / len(done) if done else 0.0,
        "outcomes": dict(Counter(r["outcome"] for r in done)),
        "files": files,
        "survivors": survivors,
    }


def page(summary: Record) -> str:
    """The page beside the data."""
    lines = [
        "# Mutants",
        "",
        f"{summary['killed']} of {summary['done']} mutants of `core/verify` killed ({summary['share']:.1%}),",
        "by tests of `core` alone. Made by cosmic-ray and picked by seed:",
        f"`{summary['command']}`, {summary['date']}; {summary['left']} of {summary['mutants']} were not tried.",
        "",
        "| file | mutants | killed | share |",
        "|---|---|---|---|",
        *(
            f"| {name} | {f['mutants']} | {f['killed']} | {f['killed'] / f['mutants']:.0%} |"
            for name, f in summary["files"].items()
        ),
        "",
        "## Survivors",
        "",
        "| place | change |",
        "|---|---|",
        *(f"| {s['file']}:{s['line']} `{s['in']}` | {_shown(s['diff'])} |" for s in summary["survivors"]),
        "",
    ]
    return "\n".join(lines)


def _shown(diff: Sequence[str]) -> str:
    return "<br>".join("`" + part.strip().replace("|", "\u2223") + "`" for part in diff)


if __name__ == "__main__":
    sys.exit(main())
