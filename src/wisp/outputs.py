"""Files and folders that a command writes once its work is done: looked at before the work begins."""

from __future__ import annotations

import os
from pathlib import Path

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
