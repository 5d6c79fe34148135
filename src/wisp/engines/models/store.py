"""Model files on disk: their folder, and the check of their contents.

A file appears under its final name only when whole and checked. Next to it lies a stamp, `<file>.sha256`,
with the size, modification time and digest seen then, so that a later start need not read a gigabyte again.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from wisp.core.errors import ConfigError, ModelError
from wisp.engines.models.cards import ModelCard
from wisp.engines.models.progress import Progress

CHUNK = 4 << 20  # bytes read at a time
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class SourceError(ModelError):
    """One source cannot give the file; the next may."""


def cache_dir() -> Path:
    """The folder for everything WISP downloads; it may not exist yet.

    `WISP_CACHE`, else `HF_HOME`/wisp, else `XDG_CACHE_HOME`/huggingface/wisp, else ~/.cache/huggingface/wisp.
    Raises ConfigError where that needs a home directory and there is none.
    """
    try:
        if own := os.environ.get("WISP_CACHE"):
            return Path(own).expanduser()
        if hub := os.environ.get("HF_HOME"):
            return Path(hub).expanduser() / "wisp"
        xdg = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        return Path(xdg).expanduser() / "huggingface" / "wisp"
    except RuntimeError:
        message = "the cache would be in a home directory that there is not; set WISP_CACHE to a folder"
        raise ConfigError(message) from None


def final_path(card: ModelCard) -> Path:
    return cache_dir() / "models" / card.file


def work_dir(card: ModelCard) -> Path:
    """Where what a pull has fetched but not yet used lies; removed once the pull is done."""
    return cache_dir() / "partial" / card.name


def is_gguf(path: Path) -> bool:
    """Whether `path` is a file that begins as GGUF files do."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        return file.read(4) == b"GGUF"
    return False


def sha256_of(path: Path, on_bytes: Callable[[int], None] = lambda done: None) -> str:
    """Digest of a file; `on_bytes` is told how many bytes have been read so far. Raises OSError."""
    digest, done = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(CHUNK):
            digest.update(block)
            on_bytes(done := done + len(block))
    return digest.hexdigest()


def stamp_path(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _seen(path: Path, sha256: str) -> dict[str, int | str]:
    stat = path.stat()
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": sha256}


def stamp(path: Path, sha256: str) -> None:
    """Note that `path`, as it is now, was checked."""
    # In a cache that cannot be written to, each start reads the file again: slow, yet right.
    with contextlib.suppress(OSError):
        write_json(stamp_path(path), _seen(path, sha256))


def is_stamped(path: Path, sha256: str) -> bool:
    """Whether `path` was checked before and has not changed since."""
    try:
        return bool(json.loads(stamp_path(path).read_text()) == _seen(path, sha256))
    except (OSError, ValueError, RecursionError):
        return False


def is_verified(path: Path, card: ModelCard, report: Progress) -> bool:
    """Whether `path` is the card's file; reads it whole only if the stamp does not settle it."""
    if is_stamped(path, card.sha256):
        return True
    try:
        if path.stat().st_size != card.size:
            return False
        found = sha256_of(path, lambda done: report(f"Checking {card.name}", done, card.size))
    except OSError:
        return False
    if found == card.sha256:
        stamp(path, found)
    return found == card.sha256


def write_json(path: Path, value: object) -> None:
    """Replace `path` in one step: a reader sees the old text or the new one. Raises OSError."""
    fresh = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        fresh.write_text(json.dumps(value))
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(card: ModelCard, report: Progress) -> Iterator[None]:
    """Keep other processes from pulling the same model. The lock goes when the process does."""
    from filelock import FileLock, Timeout  # here: only a pull needs it, and it is slow to import

    lock = FileLock(work_dir(card).with_name(card.name + ".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        report(f"Another process is pulling {card.name}; waiting for it.", 0, 0)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def require_space(folder: Path, needed: int) -> None:
    """Raise ModelError unless `needed` bytes are free on the disk of `folder`."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ModelError(
            f"Not enough room in {folder}: {_size(needed)} are needed and {_size(free)} are free. "
            "Free some space, or set WISP_CACHE to a folder on another disk."
        )


@contextlib.contextmanager
def disk_errors(where: str, setting: str) -> Iterator[None]:
    """Turn an error of the disk under `where`, which the variable `setting` moves, into a ModelError."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL:
            what = f"The disk under {where} is full"
            remedy = f"Free some space, or set {setting} to a folder on another disk"
        else:
            what = f"Cannot use {where} ({error})"
            remedy = f"Mend that, or set {setting} to a folder that you may write to"
        raise ModelError(f"{what}. {remedy}, and pull again; what was fetched so far is kept.") from error


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
