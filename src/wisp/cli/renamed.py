"""Names of earlier releases: accepted for one more release, not listed, with the new name on stderr."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from wisp.core.errors import ConfigError

# Now of `wisp sim`.
COMMANDS = {"simulate": "run", "fleet": "fleet", "capacity": "capacity", "replay": "replay"}
NAMES = {"ours": "wisp", "laxity": "wisp"}  # systems and batching policies


def say(ctx: typer.Context, line: str) -> None:
    """Print a note on stderr, once in a command."""
    said: set[str] = ctx.meta.setdefault(__name__, set())
    if line not in said:
        said.add(line)
        typer.echo(f"wisp: note: {line}", err=True)


def today(ctx: typer.Context, param: typer.CallbackParam, value: str) -> str:
    """A user's systems or batching policies, as they are called now. For options: a default is not talked about."""
    source = ctx.get_parameter_source(param.name or "")
    if source is None or source.name == "DEFAULT":
        return value

    def now(found: re.Match[str]) -> str:
        name = found[0]
        if name == "wisp":
            was = "which was `ours` or `laxity`"
            say(ctx, f"`wisp` is now the system of this project, {was}; the paper's is `paper`")
        elif name in NAMES:
            say(ctx, f"`{name}` is now called `{NAMES[name]}`")
        return NAMES.get(name, name)

    return re.sub(r"[\w-]+", now, value)


def command(old: str, now: str, run: Callable[..., None]) -> Callable[..., None]:
    """`run` under its `old` name, with the same options."""

    @functools.wraps(run)
    def renamed(*args: Any, **options: Any) -> None:
        typer.echo(f"wisp: note: `wisp {old}` is now called `wisp sim {now}`", err=True)
        run(*args, **options)

    return renamed


def _forecast(ctx: typer.Context, value: bool | None) -> bool | None:
    if value is not None:
        say(ctx, "`--forecast` is now called `--slo-admission`, and `--no-forecast` `--no-slo-admission`")
    return value


def _log_json(ctx: typer.Context, value: bool) -> bool:
    if value:
        say(ctx, "`--log-json` is now called `--log-format json`")
    return value


def _page(value: Path | None) -> None:
    if value is not None:
        raise ConfigError(
            "a clone of the repository writes this page: `python -m benchmarks drafting --out FOLDER`"
        )


Forecast = Annotated[bool | None, typer.Option("--forecast/--no-forecast", hidden=True, callback=_forecast)]
LogJson = Annotated[bool, typer.Option("--log-json", hidden=True, callback=_log_json)]
Page = Annotated[Path | None, typer.Option("--out", hidden=True, callback=_page)]
