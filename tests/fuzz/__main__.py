"""`make fuzz`, or a part of it:

    PYTHONPATH=src:.:tests:... python -m fuzz [TARGET ...] [--count N] [--seed N] [--first BLOCK] [--out FILE]

Without targets all of them, one after the other, and then `live`. With `--out`, results are added to that file, so that
a run may be made in parts.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import msgspec

from fuzz.running import Part, fuzz
from fuzz.targets import TARGETS

LAST = Path("build/fuzz")


def main() -> int:
    """Exit status 1 if anything was found."""
    about = argparse.ArgumentParser(prog="fuzz", description="Inputs near valid ones, by the million.")
    about.add_argument(
        "targets", nargs="*", default=[*TARGETS, "live"], metavar="TARGET", help=", ".join([*TARGETS, "live"])
    )
    about.add_argument(
        "--count", type=float, default=0, help="inputs of each target, instead of a full run's"
    )
    about.add_argument("--seed", type=int, default=1)
    about.add_argument("--first", type=int, default=0, help="block to begin with")
    about.add_argument("--out", type=Path, help="JSON file to add results to")
    given = about.parse_args()
    found = 0
    for name in given.targets:
        if name == "live":
            from fuzz.live import live

            part = live(int(given.count), given.seed)
        elif name in TARGETS:
            count = int(given.count) or TARGETS[name].count
            part = fuzz(name, count, given.seed, first=given.first, last=LAST / f"last-{name}")
        else:
            about.error(f"there is no target {name!r}; choose from: {', '.join([*TARGETS, 'live'])}")
        report(part)
        found += len(part.findings)
        if given.out is not None:
            add(part, given.out)
    return 1 if found else 0


def report(part: Part) -> None:
    """A line, and what was found."""
    rate = part.count / part.cpu_s if part.cpu_s else 0.0
    print(
        f"{part.target:11} {part.count:>11,} inputs, {part.taken:,} taken, {part.refused:,} refused, "
        f"{part.cpu_s:.0f} s of a core ({rate:,.0f}/s), slowest {part.slowest_s:.2f} s, memory {part.grown_kb:+,} kB, "
        f"{len(part.findings)} findings",
        flush=True,
    )
    for finding in part.findings:
        print(f"  {finding.what}\n    input: {finding.input[:600]}\n{finding.trace}", flush=True)


def add(part: Part, path: Path) -> None:
    """To the results of earlier parts."""
    earlier = msgspec.json.decode(path.read_bytes(), type=list[Part]) if path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode([*earlier, part]), indent=1))


if __name__ == "__main__":
    sys.exit(main())
