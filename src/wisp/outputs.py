"""What a command writes once its work is done: files and folders, looked at before the work begins; TOML."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wisp.core.errors import ConfigError


def writable(path: Path) -> None:
    """Make the folder of a file that is to be written later. Raises ConfigError where that would fail."""
    if path.is_dir():
        raise ConfigError(f"cannot write {path}: it is a folder; give a file in it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror or error}") from None
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"cannot write {path}: this user may not")


def writable_folder(folder: Path) -> None:
    """Make a folder that files are to be written into later. Raises ConfigError where that would fail."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"cannot write into {folder}: it is a file; give a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write into {folder}: {error.strerror or error}") from None
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"cannot write into {folder}: this user may not")


def toml_lines(fields: Mapping[str, Any]) -> list[str]:
    """Lines of a TOML file for these fields: strings, numbers, lists of them and tables in one line; None is left out.

    The JSON of a string, number or list is TOML, too, but for characters that JSON writes as two surrogates.
    """
    return [f"{name} = {_inline(value)}" for name, value in fields.items() if value is not None]


def _inline(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{{ {', '.join(toml_lines(value))} }}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_inline, value))}]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
