"""Trace files: one .npz for a domain and a sampling, without pickles, read and written here alone.

    header       UTF-8 JSON as bytes: where the trace comes from, the columns, and a row for each trace
    prompt       int32, the prompts one after another
    target       int32[N], the targets' tokens one after another
    draft        int32[N], the proposal at each of these positions
    signals      float32[columns, N]
    off_length   uint8, for each position where draft and target differ, in order
    off_token    int32[M], the off-path tokens one after another
    off_signals  float32[columns, M]

Floats are rounded to 15 significant bits (relative error below 2^-15), which compress better.
"""

from __future__ import annotations

import io
import json
import os
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from wisp.calibrate.traces.prompts import SPLITS
from wisp.core.draft.signals import STATISTICS, Signal
from wisp.core.errors import ConfigError
from wisp.core.protocol.sampling import Sampling

FORMAT = "wisp.trace.v1"
FINISHES = ("stop", "length")
DEFAULT = Path("data/traces")  # commands' default

Tokens = npt.NDArray[np.int32]
Signals = npt.NDArray[np.float32]

_DTYPES = {
    "prompt": np.int32, "target": np.int32, "draft": np.int32, "signals": np.float32,
    "off_length": np.uint8, "off_token": np.int32, "off_signals": np.float32,
}  # fmt: skip
_ROUND, _KEEP = np.uint32(1 << 8), np.uint32(0xFFFFFE00)  # 14 of 23 bits of the mantissa


class OffPath(NamedTuple):
    """The drafter's continuation after a rejected proposal at position i: tokens[j] is its proposal at position
    i + 1 + j. Shorter than the trace's depth where it ends with an end-of-sequence token, and empty where the
    rejected proposal is one.

    tokens:  int32[d]
    signals: float32[d, columns]
    """

    tokens: Tokens
    signals: Signals


@dataclass(frozen=True, eq=False)
class Trace:
    """One prompt under one sampling, n generated positions.

    label:    the sampling's name, "greedy" or e.g. "t0.7"
    sampling: as recorded, with the seed of this trace
    prompt:   int32[n_prompt], chat template included
    target:   int32[n], the target's tokens; with `finish` "stop" the last is an end-of-sequence token
    draft:    int32[n], the drafter's proposals, each after the prompt and the target's tokens before
    signals:  float32[n, columns], statistics of the draft distribution at each position
    off:      by position, for each position where draft and target differ
    columns:  names of the statistics
    """

    prompt_id: str
    domain: str
    split: str
    label: str
    sampling: Sampling
    finish: str
    prompt: Tokens
    target: Tokens
    draft: Tokens
    signals: Signals
    off: Mapping[int, OffPath]
    columns: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.target)

    @property
    def n_prompt(self) -> int:
        return len(self.prompt)

    @cached_property
    def accepted(self) -> npt.NDArray[np.bool_]:
        """bool[n]: does the drafter, on the true path, agree with the target?"""
        return np.equal(self.target, self.draft)

    def signal(self, position: int) -> Signal:
        """The signal of the proposal at `position` of the true path."""
        return as_signal(self.columns, self.signals[position])


@dataclass(frozen=True, eq=False)
class TraceSet:
    """Traces and the headers of the files that they came from. All have the same columns."""

    traces: list[Trace]
    headers: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def load(cls, path: str | Path) -> TraceSet:
        """From a file, or from the *.npz files of a folder in order of name. Raises ConfigError."""
        path = Path(path)
        files = sorted(path.glob("*.npz")) if os.path.isdir(path) else [path]
        if not files:
            raise ConfigError(f"{path} has no traces (*.npz); record some with `wisp trace`")
        traces: list[Trace] = []
        headers = []
        for file in files:
            header, some = load_file(file)
            headers.append(header)
            traces += some
            if header["columns"] != headers[0]["columns"]:
                raise ConfigError(f"{file.name} has other columns than {files[0].name}: load them apart")
        return cls(traces, headers)

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(self.headers[0]["columns"]) if self.headers else ()

    @property
    def positions(self) -> int:
        return sum(map(len, self.traces))

    def __iter__(self) -> Iterator[Trace]:
        return iter(self.traces)

    def __len__(self) -> int:
        return len(self.traces)

    def select(
        self, *, split: str | None = None, domain: str | None = None, label: str | None = None
    ) -> TraceSet:
        chosen = [
            t
            for t in self.traces
            if split in (None, t.split) and domain in (None, t.domain) and label in (None, t.label)
        ]
        return TraceSet(chosen, self.headers)


def shipped_traces() -> Path:
    """The traces that ship: inside the package, or where it runs from its sources, in their tree."""
    packaged = Path(__file__).parent / "shipped"
    return packaged if packaged.is_dir() else Path(__file__).parents[4] / DEFAULT


def trace_folder(path: Path) -> Path:
    """`path`, or the first folder of traces inside it. The default one is, where it is not below the current folder,
    what ships."""
    if path == DEFAULT and not path.exists():
        path = shipped_traces()
    if os.path.isdir(path) and not any(path.glob("*.npz")):
        inside = [p for p in sorted(path.iterdir()) if p.is_dir() and any(p.glob("*.npz"))]
        if inside:
            return inside[0]
    return path


def as_signal(columns: Sequence[str], values: Signals) -> Signal:
    """The fields of `Signal` among `values` (shape [columns])."""
    known = {name: float(value) for name, value in zip(columns, values, strict=True)}
    confidence, entropy, margin, spread, lead = (known.get(name, 0.0) for name in STATISTICS)
    return Signal(confidence, entropy, margin, spread, lead)


def rounded(values: Signals) -> Signals:
    """`values` to 15 significant bits."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + _ROUND) & _KEEP).view(np.float32)


# -- writing


def save_file(path: Path, header: Mapping[str, Any], traces: Iterable[Trace]) -> None:
    """Write `traces` below `header`. The file appears whole or not at all, and equal traces give equal bytes."""
    traces = list(traces)
    columns = tuple(header["columns"])
    about = {"format": FORMAT, **header, "traces": [_row(trace) for trace in traces]}
    off = [trace.off[int(i)] for trace in traces for i in np.flatnonzero(~trace.accepted)]
    arrays: dict[str, npt.NDArray[Any]] = {
        "header": np.frombuffer(json.dumps(about).encode(), np.uint8),
        "prompt": _joined(t.prompt for t in traces),
        "target": _joined(t.target for t in traces),
        "draft": _joined(t.draft for t in traces),
        "signals": _stacked((t.signals for t in traces), len(columns)),
        "off_length": np.array([len(o.tokens) for o in off], np.uint8),
        "off_token": _joined(o.tokens for o in off),
        "off_signals": _stacked((o.signals for o in off), len(columns)),
    }
    whole = io.BytesIO()
    np.savez_compressed(whole, allow_pickle=False, **arrays)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(whole.getvalue())
    os.replace(partial, path)


def _row(trace: Trace) -> dict[str, Any]:
    return {
        "id": trace.prompt_id,
        "domain": trace.domain,
        "split": trace.split,
        "label": trace.label,
        "temperature": trace.sampling.temperature,
        "seed": trace.sampling.seed,
        "n_prompt": trace.n_prompt,
        "n": len(trace),
        "finish": trace.finish,
    }


def _joined(parts: Iterable[Tokens]) -> Tokens:
    return np.concatenate([np.empty(0, np.int32), *parts]).astype(np.int32)


def _stacked(parts: Iterable[Signals], columns: int) -> Signals:
    """[positions, columns] of each -> [columns, positions of all]: a column's values compress well together."""
    return rounded(np.concatenate([np.empty((0, columns), np.float32), *parts]).T)


# -- reading


def load_file(path: Path) -> tuple[dict[str, Any], list[Trace]]:
    """(header, traces) of one file. Raises ConfigError with the reason."""
    try:
        header, arrays = _read(path)
        return header, list(_unpack(header, arrays))
    except _Bad as bad:
        raise ConfigError(f"{path} is not a usable trace file: {bad}") from None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from None
    except _DAMAGED as error:
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{path} is not a usable trace file, or is damaged ({reason})") from None


class _Bad(Exception):
    """A fault in the content of a file."""


_DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, KeyError, TypeError, ValueError, NotImplementedError)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
    data = path.read_bytes()
    if not zipfile.is_zipfile(io.BytesIO(data)):
        raise _Bad("it is no .npz file")
    with np.load(io.BytesIO(data), allow_pickle=False) as archive:
        header = json.loads(archive["header"].tobytes())
        if not isinstance(header, dict) or header.get("format") != FORMAT:
            raise _Bad(f"its format is not {FORMAT}; record it again with this version of wisp")
        arrays = {name: archive[name] for name in _DTYPES}
    for name, dtype in _DTYPES.items():
        if arrays[name].dtype != dtype:
            raise _Bad(f"{name} has type {arrays[name].dtype}")
    _check_shapes(header, arrays)
    return header, arrays


def _check_shapes(header: dict[str, Any], arrays: dict[str, npt.NDArray[Any]]) -> None:
    rows = header["traces"]
    columns, n = len(header["columns"]), sum(row["n"] for row in rows)
    expected = {
        "prompt": (sum(row["n_prompt"] for row in rows),),
        "target": (n,),
        "draft": (n,),
        "signals": (columns, n),
        "off_length": (int(np.sum(arrays["target"] != arrays["draft"])),),
        "off_token": (int(arrays["off_length"].sum()),),
        "off_signals": (columns, int(arrays["off_length"].sum())),
    }
    for name, shape in expected.items():
        if arrays[name].shape != shape:
            raise _Bad(f"{name} has shape {arrays[name].shape} where {shape} is expected")
    if any(row["n"] < 1 or row["n_prompt"] < 1 for row in rows):
        raise _Bad("a trace is empty")
    if any(row["split"] not in SPLITS or row["finish"] not in FINISHES for row in rows):
        raise _Bad("a trace has an unknown split or finish")
    if not (np.isfinite(arrays["signals"]).all() and np.isfinite(arrays["off_signals"]).all()):
        raise _Bad("a signal is not a number")


def _unpack(header: dict[str, Any], arrays: dict[str, npt.NDArray[Any]]) -> Iterator[Trace]:
    columns = tuple(map(str, header["columns"]))
    signals = np.ascontiguousarray(arrays["signals"].T)
    off = _off_paths(arrays)
    place = prompt = 0
    for row in header["traces"]:
        here = slice(place, place + row["n"])
        target, draft = arrays["target"][here], arrays["draft"][here]
        yield Trace(
            prompt_id=row["id"],
            domain=row["domain"],
            split=row["split"],
            label=row["label"],
            sampling=Sampling(temperature=row["temperature"], seed=row["seed"]),
            finish=row["finish"],
            prompt=arrays["prompt"][prompt : prompt + row["n_prompt"]],
            target=target,
            draft=draft,
            signals=signals[here],
            off={int(i): next(off) for i in np.flatnonzero(target != draft)},
            columns=columns,
        )
        place, prompt = place + row["n"], prompt + row["n_prompt"]


def _off_paths(arrays: dict[str, npt.NDArray[Any]]) -> Iterator[OffPath]:
    signals = np.ascontiguousarray(arrays["off_signals"].T)
    first = 0
    for length in map(int, arrays["off_length"]):
        here = slice(first, first + length)
        yield OffPath(arrays["off_token"][here], signals[here])
        first += length
