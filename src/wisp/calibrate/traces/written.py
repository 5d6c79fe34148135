"""Recorded traces as the text of an emulated engine, shared by `wisp serve --traces` and emulated devices."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

from wisp.calibrate.traces.format import trace_folder
from wisp.calibrate.traces.scripts import Library, Scripts, library
from wisp.core.errors import ConfigError
from wisp.engines.emulated import Written
from wisp.engines.identity import files_digest

_RANGE = re.compile(r"([0-9]{1,6})(?:-([0-9]{1,6}))?")


def written(traces: Path, output_tokens: str = "100-300", acceptance: float | None = None) -> Written:
    """Scripts by seed as the target's text, in a vocabulary that has room for every id of the traces.

    output_tokens: fewest and most tokens of an answer, or one number. Raises ConfigError.
    """
    lengths = read_range(output_tokens)
    found = library(traces)
    folder = trace_folder(traces)
    said = files_digest(sorted(folder.glob("*.npz")) if folder.is_dir() else [folder])
    digest = f"{said} {lengths} {acceptance}"
    return Written(Scripts(found, lengths, acceptance).token, n_vocab(found), found.eos, digest)


def n_vocab(found: Library) -> int:
    """The number of ids: of target, drafter, and at least the 256 bytes of prompts."""
    off = (token for path in found.off.values() for token, _ in path)
    return max(itertools.chain((255,), found.target, found.draft, off)) + 1


def read_range(text: str, option: str = "--output-tokens") -> tuple[int, int]:
    """`100-300` or `200`, as given to `option`. Raises ConfigError."""
    match = _RANGE.fullmatch(text.strip())
    low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= low <= high:
        raise ConfigError(f"{option} {text}: give the fewest and the most, as in 100-300")
    return low, high
