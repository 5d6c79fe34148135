"""Options in front of the command: `wisp --config FILE` and `wisp --version`."""

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
        ctx.default_map = _defaults(_read(config), ctx.command, f"{config}: ", "")


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:  # tomllib raises all of these
        raise ConfigError(f"cannot read {path}: {error}") from None


def _defaults(tables: dict[str, Any], group: Any, where: str, within: str) -> dict[str, Any]:
    """Defaults by command (or group of commands) and parameter, all of them known. Raises ConfigError.

    where: begins an error. within: the group's own name and a dot, or nothing.
    """
    defaults: dict[str, Any] = {}
    for name, table in tables.items():
        command = group.commands.get(name)
        if command is None or not isinstance(table, dict):
            known = ", ".join(sorted(f"{within}{n}" for n, c in group.commands.items() if not c.hidden))
            raise ConfigError(f"{where}[{within}{name}] is not a command; tables are named {known}")
        if hasattr(command, "commands"):
            defaults[name] = _defaults(table, command, where, f"{within}{name}.")
            continue
        defaults[name] = {k.replace("-", "_"): v for k, v in table.items()}
        if unknown := sorted(defaults[name].keys() - {p.name for p in command.params}):
            shown = f"{within}{name}"
            raise ConfigError(
                f"{where}[{shown}] has no {unknown[0]}; see wisp {shown.replace('.', ' ')} --help"
            )
    return defaults
