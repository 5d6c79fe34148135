"""The event log of a run: what the verifier was made of, then every (now, event), for replay.

    for header, events in read_runs(path):
        verifier = header.verifier()
        for now, event in events:
            verifier.handle(now, event)     # the same actions as then

Records are msgpack with a length before each. A log that several runs were appended to has a header for each.
A log that cannot be written any more ends with its last whole record, and the server goes on without it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from wisp.core.errors import ConfigError
from wisp.core.verify.admission import Admission, KeyLimits
from wisp.core.verify.batching import batching_policy
from wisp.core.verify.cost import Coefficients, CostModel
from wisp.core.verify.events import InEvent, Limits
from wisp.core.verify.verifier import Verifier

log = logging.getLogger("wisp.host")

FLUSH_S = 1.0  # between two writes: as much may be missing after a crash
FLUSH_BYTES = 1 << 16  # or sooner, once so much has come together
MODE = 0o600  # prompts are for nobody else's eyes
RENAMED = {"wisp": "paper"}  # policies of 0.1, by their names today
GONE = ("laxity", "laxity:keep")  # policies of 0.1 that later releases do not have


class LogHeader(msgspec.Struct, frozen=True, array_like=True, tag="header"):
    """What a verifier is rebuilt from, as it was at the start. cost None: the cost model knew nothing at the start."""

    wisp: str
    engine: str
    model: str
    limits: Limits
    policy: str
    cost: Coefficients | None
    max_sessions: int
    key_limits: dict[str, KeyLimits]

    def verifier(self) -> Verifier:
        """As it was when the run began. Raises ConfigError for a policy that this release does not have, and for
        coefficients that no engine has."""
        old = self.wisp.startswith("0.1.")
        if old and self.policy in GONE:
            raise ConfigError(
                f"this event log is of wisp {self.wisp} with batching policy {self.policy!r}, which max-weight batching"
                f" has replaced since: it replays to the same actions only with wisp {self.wisp}"
            )
        if self.cost is not None and (problem := self.cost.problem()):
            raise ConfigError(f"this event log is damaged: {problem}")
        policy = RENAMED.get(self.policy, self.policy) if old else self.policy
        admission = Admission(self.max_sessions, dict(self.key_limits))
        return Verifier(self.limits, batching_policy(policy), admission, CostModel(self.cost))


_Record = InEvent | LogHeader


class EventLog:
    """Appends to a file. What was written is on its way to the disk within a second. For one event loop.

    lost: the file is closed, or could not be written: nothing more will be
    """

    def __init__(
        self, path: Path, header: LogHeader, now: float, on_loss: Callable[[], None] = lambda: None
    ) -> None:
        """`on_loss` is called once, when the file can be written no longer. Raises ConfigError."""
        try:
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, MODE)
            self._size = os.fstat(self._file).st_size  # of whole records
        except OSError as error:
            raise ConfigError(f"cannot write the event log {path}: {error.strerror or error}") from None
        self.lost = False
        self._path = path
        self._on_loss = on_loss
        self._encoder = msgspec.msgpack.Encoder()
        self._pending = bytearray()
        self._timer: asyncio.TimerHandle | None = None
        self._write(now, header)

    def write(self, now: float, event: InEvent) -> None:
        """Append one event. Never raises OSError: see `lost`."""
        self._write(now, event)

    def close(self) -> None:
        if not self.lost:
            self._flush()
        if not self.lost:
            self.lost = True
            try:
                os.close(self._file)
            except OSError as error:  # some disks say so only now
                self._say(error)

    def _write(self, now: float, record: InEvent | LogHeader) -> None:
        if self.lost:
            return
        data = self._encoder.encode((now, record))
        self._pending += len(data).to_bytes(4, "little") + data
        if len(self._pending) >= FLUSH_BYTES:
            self._flush()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(FLUSH_S, self._flush)

    def _flush(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        size = len(self._pending)
        try:
            while self._pending:
                del self._pending[: os.write(self._file, self._pending)]
        except OSError as error:
            self._lose(error)
        else:
            self._size += size

    def _lose(self, error: OSError) -> None:
        self.lost = True
        self._say(error)
        self._pending.clear()
        # A pipe cannot be shortened, and a broken disk perhaps not even closed.
        with contextlib.suppress(OSError):
            os.ftruncate(self._file, self._size)
        with contextlib.suppress(OSError):
            os.close(self._file)

    def _say(self, error: OSError) -> None:
        log.error(
            "cannot write the event log %s: %s; it ends here, and the server goes on without it. "
            "For a new one make room and start again",
            self._path,
            error.strerror or error,
        )
        self._on_loss()


def read_runs(path: Path) -> list[tuple[LogHeader, list[tuple[float, InEvent]]]]:
    """The runs in an event log, each with its (now, event) pairs in order. One that a crash cut short is left out.

    Raises ConfigError for a log without headers, of an earlier release.
    """
    runs: list[tuple[LogHeader, list[tuple[float, InEvent]]]] = []
    for now, record in _records(path):
        if isinstance(record, LogHeader):
            runs.append((record, []))
        elif not runs:
            raise ConfigError(f"{path} does not begin with a header; it was written by an earlier release")
        else:
            runs[-1][1].append((now, record))
    return runs


def _records(path: Path) -> Iterator[tuple[float, _Record]]:
    decoder = msgspec.msgpack.Decoder(tuple[float, _Record])
    data = path.read_bytes()
    at = 0
    while at + 4 <= len(data):
        size = int.from_bytes(data[at : at + 4], "little")
        if at + 4 + size > len(data):
            break
        try:
            yield decoder.decode(data[at + 4 : at + 4 + size])
        except (msgspec.DecodeError, ValueError, RecursionError) as error:
            raise ConfigError(f"{path} is not an event log of this release: {error}") from None
        at += 4 + size
