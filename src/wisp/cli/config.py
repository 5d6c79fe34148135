"""What stands before the command: `wisp --config FILE` and `wisp --version`."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any

import typer

from wisp import __version__
from wisp.core.errors import ConfigError


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"wisp {__version__}")
        raise typer.Exit


def configure(
    ctx: typer.Context,
    config: Annotated[Path | None, typer.Option(help="TOML file with a table per command.")] = None,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    if config is not None:
        commands = getattr(ctx.command, "commands", {})
        known = {name: {p.name for p in command.params} for name, command in commands.items()}
        ctx.default_map = _read(config, known)


def _read(path: Path, known: dict[str, set[str]]) -> dict[str, Any]:
    """Defaults by command and parameter, all of them `known`. Raises ConfigError."""
    try:
        tables = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    defaults: dict[str, Any] = {}
    for command, table in tables.items():
        if command not in known or not isinstance(table, dict):
            raise ConfigError(
                f"{path}: [{command}] is not a command; tables are named {', '.join(sorted(known))}"
            )
        defaults[command] = {k.replace("-", "_"): v for k, v in table.items()}
        if unknown := sorted(defaults[command].keys() - known[command]):
            raise ConfigError(f"{path}: [{command}] has no {unknown[0]}; see wisp {command} --help")
    return defaults
