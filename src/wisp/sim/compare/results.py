"""The file of a comparison: written after each cell, and gone on with after a break."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import msgspec

import wisp
from wisp.core.errors import ConfigError
from wisp.sim.compare.cell import CellResult, Extent

FORMAT = "wisp-compare-1"


class Comparison(msgspec.Struct, frozen=True):
    """All cells that are done, in the order of the suite. failing: of these, where `wisp` does not pass."""

    format: str
    wisp: str
    quick: bool
    extent: Extent
    of: int
    cpu_s: float
    failing: list[str]
    cells: list[CellResult]


def comparison(cells: list[CellResult], *, quick: bool, extent: Extent, of: int) -> Comparison:
    """Of the cells that are done; `of` are wanted."""
    failing = [cell.name for cell in cells if not cell.passes]
    cpu_s = round(sum(cell.cpu_s for cell in cells), 1)
    return Comparison(FORMAT, wisp.__version__, quick, extent, of, cpu_s, failing, cells)


def read(path: Path) -> Comparison | None:
    """What a run before has left; None if there is no such file. Raises ConfigError."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Comparison)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{path} is no file of this command ({error}): give another --out, or remove it"
        ) from None


def write(path: Path, found: Comparison) -> None:
    """All at once: a run that is killed leaves the file as it was."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(as_text(msgspec.to_builtins(found)))
    partial.replace(path)


def as_text(data: dict[str, Any]) -> str:
    """As JSON with a line for each cell."""
    head = "".join(
        f"{json.dumps(key)}: {json.dumps(value)},\n" for key, value in data.items() if key != "cells"
    )
    cells = ",\n".join(map(json.dumps, data["cells"]))
    return f'{{\n{head}"cells": [\n{cells}\n]\n}}\n'
