"""Pages under docs/results: the template of that name in `templates/`, filled from the data written beside the page."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import jinja2
import msgspec

Data = dict[str, Any]

# The module of each page: its function `figures` makes what the template needs beside the data.
SOURCES = {
    **{
        n: f"benchmarks.experiments.{n}"
        for n in ("table", "paper", "regimes", "bursts", "ablations", "overlap", "reality")
    },
    "suite": "benchmarks.suite",
    "drafting": "benchmarks.drafting",
    "ahead": "benchmarks.reality.ahead",
    "faults": "benchmarks.faults",
    "soak": "benchmarks.soak.page",
}

_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    keep_trailing_newline=True,
)
_TEMPLATES.filters["f"] = format  # {{ share | f(".0%") }}


def render(name: str, data: Data, figures: Data) -> str:
    """The page: its template sees the data of the JSON file, and `figures`, which are made of them."""
    return _TEMPLATES.get_template(f"{name}.md").render(dict(**data, **figures))


def remade(name: str, folder: Path) -> str:
    """The page as it is made of the data in that folder."""
    data = json.loads((folder / f"{name}.json").read_text())
    return render(name, data, import_module(SOURCES[name]).figures(data))


def write_data(path: Path, data: Data) -> Data:
    """Write data as JSON. Returns them as they will be read, so that a page made later is the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = json.dumps(data, indent=1, default=msgspec.to_builtins)
    path.write_text(written + "\n")
    return dict(json.loads(written))


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])
