"""An event log of `wisp serve --event-log` in the page that shows live fleets, as one file."""

from __future__ import annotations

from pathlib import Path

from wisp.api.pages.recorder import Recorder
from wisp.api.pages.site import self_contained
from wisp.core.errors import ConfigError
from wisp.server.event_log import read_runs

ROWS = 600  # of the page, at most; a longer run has wider ones


def write_log_page(log: Path, out: Path) -> int:
    """Replay the last run in `log`, and write its page. Returns how many events it has. Raises ConfigError."""
    try:
        runs = read_runs(log)
    except OSError as error:
        raise ConfigError(f"cannot read {log}: {error.strerror or error}") from None
    if not runs or not runs[-1][1]:
        raise ConfigError(f"{log} holds no event of a run; is it an event log of `wisp serve --event-log`?")
    header, events = runs[-1]
    begin, end = events[0][0], events[-1][0]
    verifier = header.verifier()
    width_s = max(1.0, (end - begin) / ROWS)
    recorder = Recorder(verifier, width_s=width_s, kept=ROWS + 1, live=False, epoch=-begin)
    for now, event in events:
        recorder(now, event, verifier.handle(now, event))
    data = {
        "kind": "run",
        "version": header.wisp,
        "state": "over",
        "title": f"{log.name}, run {len(runs)} of {len(runs)}",
        "model": header.model,
        "engine": header.engine,
        "batching": header.policy,
        **recorder.snapshot(end + width_s),
    }
    out.write_text(self_contained(data), encoding="utf-8")
    return len(events)
