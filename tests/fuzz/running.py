"""The loop, and the judge: inputs to a target, and what must not come of them.

Inputs come in blocks, each from a seed of its own, so that a run can be made in parts and any input found again.
"""

from __future__ import annotations

import contextlib
import mmap
import resource
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import psutil

from fuzz.base import FuzzTarget
from fuzz.mutate import Mutator
from fuzz.targets import TARGETS

BLOCK = 10_000
NATIVE_BLOCK = 500  # inputs of those that may end the process
MOST_FINDINGS = 20  # of a target; one defect is found again and again
KEPT_INPUT = 16 << 20  # bytes


class Finding(msgspec.Struct, frozen=True):
    """What must not come of an input. `input`: its repr, or the place where it is kept."""

    target: str
    what: str
    input: str
    trace: str = ""


class Part(msgspec.Struct):
    """What came of some inputs. cpu_s: of this process. slowest_s: one input. grown_kb: resident memory, by all.

    curve: after so many inputs, resident memory in kB, beside what it was when warm
    """

    target: str
    seed: int
    count: int = 0
    taken: int = 0
    refused: int = 0
    cpu_s: float = 0.0
    slowest_s: float = 0.0
    grown_kb: int = 0
    findings: list[Finding] = []
    curve: list[tuple[int, int]] = []


class Judge:
    """Gives inputs to one target's reader."""

    def __init__(self, target: FuzzTarget, folder: Path, part: Part, keep: Callable[[bytes], None]) -> None:
        """keep: called with each input that may end the process."""
        self._target = target
        self._read = target.reader(folder)
        self._part = part
        self._keep = keep if target.native else None
        self._places: set[str] = set()  # where defects were found

    def judge(self, data: bytes) -> None:
        """One input."""
        part, target = self._part, self._target
        part.count += 1
        if self._keep is not None:
            self._keep(data)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if target.native else 0
        began = time.perf_counter()
        try:
            self._read(data)
            part.taken += 1
        except target.declared:
            part.refused += 1
        except (KeyboardInterrupt, MemoryError):
            raise
        except BaseException as error:  # whatever it is, it must not be
            self._find(f"{type(error).__name__}: {str(error)[:300]}", data, error)
        took = time.perf_counter() - began
        if took > target.slow_s and (took := self._again_s(data)) > target.slow_s:
            self._find(f"takes {took:.1f} s of a core", data)
        part.slowest_s = max(part.slowest_s, took if took > 0.05 else 0.0)
        if target.native:
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
            if grown > target.memory_mb << 10:
                self._find(f"takes {grown >> 10} MB", data)

    def _again_s(self, data: bytes) -> float:
        """Its time on a core, as the machine may be busy."""
        began = time.process_time()
        with contextlib.suppress(BaseException):  # judged before
            self._read(data)
        return time.process_time() - began

    def _find(self, what: str, data: bytes, error: BaseException | None = None) -> None:
        trace = "".join(traceback.format_exception(error)) if error is not None else ""
        place = _place(error) if error is not None else what.partition(" ")[0]
        if place in self._places or len(self._part.findings) >= MOST_FINDINGS:
            return
        self._places.add(place)
        self._part.findings.append(Finding(self._target.name, what, repr(data[:4000]), trace[-3000:]))


def _place(error: BaseException) -> str:
    """The kind of an error and the lines of ours that it came from."""
    lines = [
        f"{f.name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__) if "/wisp/" in f.filename
    ]
    return f"{type(error).__name__} {lines[-2:]}"


@contextmanager
def last_input(path: Path | None) -> Iterator[Callable[[bytes], None]]:
    """Keeps the last input in a file, even if the process is killed by it."""
    if path is None:
        yield lambda data: None
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb+") as file:
        file.truncate(KEPT_INPUT)
        with mmap.mmap(file.fileno(), KEPT_INPUT) as kept:

            def keep(data: bytes) -> None:
                data = data[: KEPT_INPUT - 4]
                kept[: 4 + len(data)] = len(data).to_bytes(4, "little") + data

            yield keep


def fuzz(name: str, count: int, seed: int, *, first: int = 0, last: Path | None = None) -> Part:
    """`count` inputs to a target, from block `first` on. last: where the last input is kept."""
    target = TARGETS[name]
    part = Part(name, seed)
    block = NATIVE_BLOCK if target.native else BLOCK
    memory = psutil.Process().memory_info
    began, warm = time.process_time(), 0
    with tempfile.TemporaryDirectory() as folder, last_input(last if target.native else None) as keep:
        judge = Judge(target, Path(folder), part, keep)
        number = first
        while part.count < count:
            inputs: Mutator = target.mutator(f"{name}/{seed}/{number}")
            for _ in range(min(block, count - part.count)):
                judge.judge(inputs.input())
            if number == first:
                warm = memory().rss
            number += 1
        part.grown_kb = (memory().rss - warm) >> 10
    part.cpu_s = round(time.process_time() - began, 1)
    return part
