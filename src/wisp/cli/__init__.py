"""The command line: one thin command each, listed here in the groups of `wisp --help`.

Every flag has an environment variable WISP_<COMMAND>_<FLAG>, e.g. WISP_SERVE_PORT or WISP_SIM_RUN_SEED, and
`wisp --config FILE` takes any of them from a TOML file with a table per command, e.g. [serve] or [sim.run]. What a
command needs is imported when it runs, so that help comes at once.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys

# Two pools of spinning threads on one machine ruin each other; this must be set before llama.cpp loads.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import typer

from wisp.cli import check, device, measure, renamed, replicas, research, serve, try_
from wisp.cli.config import configure
from wisp.cli.help import Commands
from wisp.core.errors import WispError

app = typer.Typer(
    name="wisp",
    cls=Commands,
    help="Distributed speculative LLM serving: edges draft, a verifier decides, the text is the target's own.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"auto_envvar_prefix": "WISP", "help_option_names": ["-h", "--help"]},
)
app.callback()(configure)
GROUPS = {
    "Serve": (serve.serve, device.edge),
    "Try": (try_.demo, device.generate, try_.pull, try_.doctor),
    "Measure": (measure.plan, measure.profile, measure.trace, measure.train),
    "Check": (check.check_lossless, check.check_faults),
}
for group, commands in GROUPS.items():
    for command in commands:
        app.command(rich_help_panel=group)(command)
app.add_typer(replicas.app, name="replicas", rich_help_panel="Serve")
app.add_typer(research.app, name="sim", rich_help_panel="Research")
for old, now in renamed.COMMANDS.items():
    app.command(old, hidden=True)(renamed.command(old, now, getattr(research, now)))


def main() -> None:
    """Entry point. Errors that users can mend are one line: exit code 2, or 1 where the system said no."""
    _open_streams()
    try:
        app()
    except WispError as error:
        typer.echo(f"wisp: {error}", err=True)
        sys.exit(2)
    except OSError as error:  # a full disk, a file that may not be read or written
        _flush_or_close()
        typer.echo(f"wisp: {error}", err=True)
        sys.exit(1)


def _flush_or_close() -> None:
    """What standard output still holds cannot be written if that was the trouble, and Python would say so at length."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError):
            sys.stdout.close()


def _open_streams() -> None:
    """Streams that were closed lead nowhere, and characters that a terminal does not have are replaced."""
    null = open(os.devnull, "r+", encoding="utf-8") if None in (sys.stdin, sys.stdout, sys.stderr) else None  # noqa: SIM115
    sys.stdin, sys.stdout, sys.stderr = (s or null for s in (sys.stdin, sys.stdout, sys.stderr))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace" if stream is sys.stdout else "backslashreplace")
