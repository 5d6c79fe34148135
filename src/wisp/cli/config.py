"""Options in front of the command: `wisp --config FILE` and `wisp --version`."""

from __future__ import annotations

import inspect
import tomllib
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from wisp import __version__
from wisp.core.errors import ConfigError

# Options that take several strings, with commas between them; in a file they may be a list
_BY_COMMA = frozenset({"served_model_name", "allowed_hosts", "cors_origins", "tensor_split", "policies"})
# By an option's type: the types of a file's values that it takes, and what it takes in words. All take text, as they do
# from a command line
_TAKES: dict[Any, tuple[tuple[type, ...], str]] = {
    bool: ((bool, str), "true or false"),
    int: ((int, str), "an integer"),
    float: ((float, int, str), "a number"),
    str: ((str,), "a string"),
    Path: ((str,), "a string"),
    list: ((list,), "a list"),
    Any: ((str, dict), "a string or tables"),
}


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
        kinds = _kinds(command)
        defaults[name] = {
            key: _value(f"{where}[{within}{name}]", key, value, kinds.get(key, ()))
            for key, value in ((k.replace("-", "_"), v) for k, v in table.items())
        }
        if unknown := sorted(defaults[name].keys() - {p.name for p in command.params}):
            shown = f"{within}{name}"
            raise ConfigError(
                f"{where}[{shown}] has no {unknown[0]}; see wisp {shown.replace('.', ' ')} --help"
            )
    return defaults


def _kinds(command: Any) -> dict[str, tuple[Any, ...]]:
    """The types that each parameter of a command may have."""
    hints = get_type_hints(inspect.unwrap(command.callback))
    return {name: get_args(hint) if isinstance(hint, UnionType) else (hint,) for name, hint in hints.items()}


def _value(where: str, name: str, value: Any, kinds: tuple[Any, ...]) -> Any:
    """A value as the option takes it. Raises ConfigError for a type that it does not take.

    Typer makes a string of anything. kinds: of the option; none for one that is unknown, which is told of later.
    """
    if name in _BY_COMMA and isinstance(value, list) and all(type(v) in (str, int, float) for v in value):
        return ",".join(map(str, value))
    for kind in kinds:
        takes, _ = _TAKES.get(get_origin(kind) or kind, ((), ""))
        if type(value) in takes:
            return value
    expected = " or ".join(_TAKES[k][1] for k in (get_origin(kind) or kind for kind in kinds) if k in _TAKES)
    if not expected:
        return value
    raise ConfigError(f"{where} --{name.replace('_', '-')} takes {expected}, not {_shown(value)}")


def _shown(value: Any) -> str:
    names = {list: "a list", dict: "a table", bool: str(value).lower(), str: "a string"}
    return names.get(type(value), str(value))
