"""`wisp trace`: record traces with a progress bar, and print a summary."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from wisp.calibrate.traces.prompts import load_prompts
from wisp.calibrate.traces.record import Recording, Report, Settings, summary
from wisp.engines.build import served_name
from wisp.engines.models import RichProgress, resolve
from wisp.outputs import writable_folder
from wisp.progress import progress_bar


def run_trace(
    target: str,
    draft: str,
    prompts: Path,
    out: Path,
    settings: Settings,
    *,
    offline: bool,
    as_json: bool,
) -> None:
    """Record (or go on recording) into `out`, and print the summary. Raises WispError."""
    chosen = load_prompts(prompts)
    writable_folder(out)
    with RichProgress() as progress:
        paths = [resolve(name, offline=offline, progress=progress) for name in (target, draft)]
    models = [(served_name(name), path) for name, path in zip((target, draft), paths, strict=True)]
    recording = Recording(models[0], models[1], chosen, settings, out)
    try:
        with _progress() as report:
            traces = recording.run(report)
    except KeyboardInterrupt:
        print(
            f"Stopped. The same command goes on where it was; what is recorded is in {out}.", file=sys.stderr
        )
        raise
    about = summary(traces, out)
    print(json.dumps(about)) if as_json else _show(about)


@contextlib.contextmanager
def _progress() -> Iterator[Report]:
    """A bar; where standard error is no terminal, a line for each group begun."""
    if sys.stderr.isatty():
        with progress_bar() as tell:
            yield lambda task, share: tell(task, share, 1.0)
        return
    said = ""

    def say(task: str, share: float) -> None:
        nonlocal said
        if task != said:
            print(f"{100 * share:5.1f} %  {task}", file=sys.stderr, flush=True)
        said = task

    yield say


def _show(about: dict[str, Any]) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for name in ("domain", "split", "sampling"):
        table.add_column(name, no_wrap=True)
    for name in ("prompts", "positions", "accepted"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in about["rows"]:
        cells = [row["domain"], row["split"], row["sampling"], str(row["prompts"]), str(row["positions"])]
        table.add_row(*cells, f"{row['acceptance']:.1%}")
    console = Console()
    console.print(table)
    console.print(
        f"{about['positions']} positions of {about['prompts']} prompts, {about['acceptance']:.1%} accepted, and "
        f"{about['off_path_positions']} off the path; {about['bytes'] / 1e6:.2f} MB in {about['out']}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
