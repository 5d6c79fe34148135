"""Mutants of the verifier's heart: small changes to its source, each of which some test should notice.

    python -m tools.mutants --with PYTHON [--count 500] [--seed 1] [--minutes 60] [--out docs/results/mutants.json]

cosmic-ray, in an environment of its own, makes them (`mutating`); some are picked by seed, and each meets the tests
that reach it (`mutant_tests`). A run that was cut short goes on where it stopped. What was killed stays so; survivors
are tried again once tests have changed.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import subprocess
import sys
import time
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tools import mutant_tests
from tools.mutant_tests import TESTS, Reach, Record, Runner, annotated, changed_function, fork, lines_at

FOLDER = Path("build/mutants")
MUTATED = "src/wisp/core/verify"
# KV, sessions and the verifier, with the parts that have files of their own.
PARTS = (
    "index", "kv", "opening", "progress", "registry", "results", "rounds", "session", "states", "targets", "verifier",
)  # fmt: skip
KINDS = tuple(f"{part}*.py" for part in PARTS)
EQUIVALENT = Path(__file__).with_name("equivalent.toml")
BATCH = 50  # mutants
Attempt = tuple[
    Record, Sequence[str], float
]  # a mutant, its tests, and the seconds that these take without it
ANNOTATION = "an annotation, which does not run"


def main(arguments: Sequence[str] | None = None) -> int:
    about = argparse.ArgumentParser(prog="mutants")
    about.add_argument("--with", dest="maker", type=Path, required=True, help="a Python that has cosmic-ray")
    about.add_argument("--count", type=int, default=500)
    about.add_argument("--seed", type=int, default=1)
    about.add_argument(
        "--minutes", type=float, default=0.0, help="stop after that long, to go on another time"
    )
    about.add_argument("--jobs", type=int, default=1, help="mutants at a time")
    about.add_argument("--note", default="", help="a sentence for the page about this seed")
    about.add_argument("--out", type=Path, default=Path("docs/results/mutants.json"))
    given = about.parse_args(arguments)
    FOLDER.mkdir(parents=True, exist_ok=True)
    files = mutated_files()
    made = mutants_of(files, given.maker, given.count, given.seed)
    mutants: list[Record] = made["mutants"]
    tests = digest(TESTS)
    reach = mutant_tests.recorded(files, FOLDER, f"{digest('src/wisp')}-{tests}")
    results = Results(FOLDER / f"{given.count}-{given.seed}.jsonl", tests)
    deadline = time.monotonic() + given.minutes * 60.0 if given.minutes else float("inf")
    left = [mutant for mutant in mutants if results.of(mutant) is None]
    left.sort(key=results.tried)  # survivors of earlier tests after all others
    carry_out(left, reach, results, given.jobs, deadline)
    untried: Record = {"outcome": None, "cpu_s": 0.0}
    # A survivor of earlier tests that was not tried again is a survivor.
    records = [{**mutant, **results.found.get(name_of(mutant), untried)} for mutant in mutants]
    summary = summed(records, made["of"], given.seed, known_equivalents())
    summary["note"] = given.note
    write(summary, given.out)
    print(
        f"{summary['killed']} of {summary['done']} killed ({summary['share']:.1%}); {summary['left']} to do; "
        f"{summary['cpu_s'] / 60:.1f} minutes of a core"
    )
    return 0


def mutated_files() -> list[str]:
    return sorted(str(path) for kind in KINDS for path in Path(MUTATED).glob(kind))


def mutants_of(files: Sequence[str], maker: Path, count: int, seed: int) -> Record:
    """Those that `mutating` prints; kept, as they take half a minute."""
    contents = hashlib.sha256(b"\0".join(Path(file).read_bytes() for file in files)).hexdigest()[:16]
    kept = FOLDER / f"mutants-{count}-{seed}-{contents}.json"
    if not kept.exists():
        command: list[str | Path] = [maker, "tools/mutating.py", str(count), str(seed), *files]
        kept.write_bytes(subprocess.run(command, check=True, capture_output=True).stdout)
    found: Record = json.loads(kept.read_text())
    return found


def digest(folder: str) -> str:
    contents = (path.read_bytes() for path in sorted(Path(folder).rglob("*.py")))
    return hashlib.sha256(b"\0".join(contents)).hexdigest()[:16]


class Results:
    """What came of mutants, a line each in a file, by their source."""

    def __init__(self, path: Path, tests: str) -> None:
        """tests: names this state of the tests."""
        self.path, self.tests = path, tests
        self.load()

    def load(self) -> None:
        """What other processes have added, too."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        results: list[Record] = [json.loads(line) for line in lines]
        self.found: dict[str, Record] = {result["mutant"]: result for result in results}

    def of(self, mutant: Record) -> Record | None:
        result = self.found.get(name_of(mutant))
        return (
            None
            if result is None or (result["outcome"] == "survived" and result["tests"] != self.tests)
            else result
        )

    def tried(self, mutant: Record) -> bool:
        """By these or by earlier tests."""
        return name_of(mutant) in self.found

    def add(self, mutant: Record, outcome: str, cpu_s: float) -> None:
        name = name_of(mutant)
        result: Record = {"mutant": name, "outcome": outcome, "cpu_s": round(cpu_s, 2), "tests": self.tests}
        self.found[name] = result
        with self.path.open("a") as file:
            file.write(json.dumps(result) + "\n")


def name_of(mutant: Record) -> str:
    return hashlib.sha256(f"{mutant['file']}\0{mutant['source']}".encode()).hexdigest()[:24]


def carry_out(mutants: Sequence[Record], reach: Reach, results: Results, jobs: int, deadline: float) -> None:
    """Run the tests of each, `jobs` at a time, until the deadline."""
    mutant_tests.prepare(reach.modules)
    trees = {file: ast.parse(Path(file).read_text()) for file in mutated_files()}
    left: list[Attempt] = []
    for mutant in mutants:
        tree = trees[mutant["file"]]
        seen = not annotated(tree, mutant["line"], mutant["column"])
        tests = reach.tests(mutant["file"], lines_at(tree, mutant["line"])) if seen else []
        left.append((mutant, tests, sum(reach.seconds[test] for test in tests)))
    (FOLDER / "last.log").unlink(missing_ok=True)
    with (FOLDER / "last.log").open("ab") as log:  # of several processes

        def attempt(
            attempts: Sequence[Attempt], start: Callable[[Record, Sequence[str], float, int], int]
        ) -> None:
            running: dict[int, Record] = {}
            waiting = list(reversed(attempts))
            while running or (waiting and time.monotonic() < deadline):
                while waiting and len(running) < jobs and time.monotonic() < deadline:
                    mutant, tests, cpu_s = waiting.pop()
                    running[start(mutant, tests, cpu_s, log.fileno())] = mutant
                if running:
                    pid, status, used = os.wait4(-1, 0)
                    results.add(running.pop(pid), mutant_tests.outcome(status), used.ru_utime + used.ru_stime)

        # The quick ones and the others in turn, so that a part of a run is a fair sample.
        for at in range(0, len(left), BATCH):
            if time.monotonic() >= deadline:
                break
            quick: list[Attempt] = []
            others: list[Attempt] = []
            for each in left[at : at + BATCH]:
                if not each[1]:
                    results.add(each[0], "survived", 0.0)  # an annotation, or a line that no test reaches
                else:
                    (others if changed_function(each[0]) is None else quick).append(each)
            attempt(others, mutant_tests.start)
            pid = fork(lambda: in_functions(lambda runner: attempt(quick, runner.start)), log.fileno())  # noqa: B023
            if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
                raise SystemExit(f"tests could not be run: see {log.name}")
    results.load()


def in_functions(work: Callable[[Runner], None]) -> int:
    mutant_tests.collected(work)
    return 0


def known_equivalents() -> list[Record]:
    """Changes that change nothing that can be seen: file, line before, line after, why."""
    found: list[Record] = tomllib.loads(EQUIVALENT.read_text())["equivalent"]
    return found


def why_equivalent(record: Record, known: Sequence[Record]) -> str:
    """Empty if some test could notice the change."""
    if annotated(ast.parse(Path(record["file"]).read_text()), record["line"], record["column"]):
        return ANNOTATION
    old = [part[1:].strip() for part in record["diff"] if part.startswith("-")]
    new = [part[1:].strip() for part in record["diff"] if part.startswith("+")]
    for each in known:
        if [each["old"]] == old and new in ([each["new"]], each["new"]):
            return str(each["why"])
    return ""


def summed(records: Sequence[Record], of: int, seed: int, known: Sequence[Record]) -> Record:
    """of: mutants that could be made."""
    done = [r for r in records if r["outcome"] is not None]
    kept = ("file", "line", "in", "operator", "diff")
    survivors: list[Record] = [
        {**{name: r[name] for name in kept}, "equivalent": why_equivalent(r, known)}
        for r in done
        if r["outcome"] == "survived"
    ]
    survivors.sort(key=lambda r: (r["file"], r["line"], r["operator"]))
    files = {
        Path(file).name: {
            "mutants": sum(r["file"] == file for r in done),
            "killed": sum(r["file"] == file and r["outcome"] != "survived" for r in done),
        }
        for file in sorted({r["file"] for r in done})
    }
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "seed": seed,
        "of": of,
        "mutants": len(records),
        "done": len(done),
        "left": len(records) - len(done),
        "killed": len(done) - len(survivors),
        "share": (len(done) - len(survivors)) / len(done) if done else 0.0,
        "equivalent": sum(bool(s["equivalent"]) for s in survivors),
        "outcomes": dict(Counter(r["outcome"] for r in done)),
        "cpu_s": round(sum(r["cpu_s"] for r in done), 1),
        "files": files,
        "survivors": survivors,
    }


def write(summary: Record, out: Path) -> None:
    """Data and page, beside the runs with other seeds."""
    runs: list[Record] = json.loads(out.read_text())["runs"] if out.exists() else []
    runs = sorted([*(r for r in runs if r["seed"] != summary["seed"]), summary], key=lambda r: r["seed"])
    out.write_text(json.dumps({"runs": runs}, indent=1) + "\n")
    out.with_suffix(".md").write_text(page(runs))


def page(runs: Sequence[Record]) -> str:
    """The page beside the data."""
    return "\n".join(
        [
            "# Mutants",
            "",
            f"Small changes to `{MUTATED}` (`{'`, `'.join(KINDS)}`), each of which a test should notice: made by",
            f"cosmic-ray, picked by seed, and given to those tests of `{TESTS}` that reach the changed line, up to the",
            "first that fails: `make mutants SEED=1`. An *equivalent* one changes nothing that can be seen, and counts",
            "as a survivor all the same.",
            "",
            "| seed | date | mutants | tried | killed | share | equivalent | share of the others | core |",
            "|---|---|---|---|---|---|---|---|---|",
            *map(_line, runs),
            *(part for run in runs for part in _section(run)),
        ]
    )


def _line(run: Mapping[str, Any]) -> str:
    others = run["done"] - run["equivalent"]
    share = f"{run['killed'] / others:.1%}" if others else ""
    return (
        f"| {run['seed']} | {run['date']} | {run['mutants']} of {run['of']:,} | {run['done']} | {run['killed']} | "
        f"{run['share']:.1%} | {run['equivalent']} | {share} | {run['cpu_s'] / 60:.0f} min |"
    )


def _section(run: Record) -> Iterator[str]:
    yield from ("", f"## Seed {run['seed']}", "")
    if run["note"]:
        yield from (run["note"], "")
    yield from ("| file | mutants | killed | share |", "|---|---|---|---|")
    for name, file in run["files"].items():
        yield f"| {name} | {file['mutants']} | {file['killed']} | {file['killed'] / file['mutants']:.0%} |"
    annotations = sum(s["equivalent"] == ANNOTATION for s in run["survivors"])
    yield from ("", f"Survivors, but for {annotations} changes to annotations, which do not run:", "")
    yield from ("| place | change | equivalent, as |", "|---|---|---|")
    for s in run["survivors"]:
        if s["equivalent"] != ANNOTATION:
            yield f"| {Path(s['file']).name}:{s['line']} `{s['in']}` | {_shown(s['diff'])} | {s['equivalent']} |"
    yield ""


def _shown(diff: Sequence[str]) -> str:
    return "<br>".join("`" + part.strip().replace("|", "\u2223") + "`" for part in diff)


if __name__ == "__main__":
    sys.exit(main())
