"""A hard bound on what compiling a grammar costs: it is tried first in a process that the system ends.

llguidance has limits of its own, but some grammars of a few bytes take it minutes and gigabytes all the same: products
of automata, as of `multipleOf` and of expressions that have to hold together. Nothing can stop a thread in there. So:

    this process  --- grammar --->  worker, kept warm  --- fork --->  child: compiles within limits of processor time
                  <-- verdict ----                                    and memory, says so, and ends

What the child has compiled is compiled here, too: a compiled grammar cannot be sent. Workers have a vocabulary of the
same ids, but of all texts only single bytes, so that they stay small; what longer tokens add to the work is within
llguidance's own limits. A worker that says nothing for long is ended with its child: that is the machine's trouble and
not the grammar's. Where there is no fork (Windows) nothing is tried, and nothing bounded; without /proc (macOS) time is
bounded, and memory is not.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import IO, TypeVar

import msgspec

from wisp.core.errors import GrammarBusyError, GrammarError
from wisp.core.protocol.constraints import Grammar
from wisp.engines.grammar_library import NO_TEXT, compiled, vocabulary

CPU_S = 2.0  # of a core
WALL_S = 60.0  # for CPU_S on a machine where others want the core as well
MOST_BYTES = 40 << 20  # 1,500 optional properties take 9 MB
IDLE = 2  # workers that are kept: 40 MB each

_COSTLY = ("multipleOf", "pattern", "patternProperties", "format", "allOf", "anyOf", "oneOf")
T = TypeVar("T")
_LENGTH = struct.Struct("<I")


class Words(msgspec.Struct, frozen=True, array_like=True):
    """A vocabulary in short. ends: ids that end a text; tokens: what single bytes and control tokens are, by id."""

    n_vocab: int
    ends: list[int]
    tokens: dict[int, bytes]


class _Job(msgspec.Struct, frozen=True, array_like=True):
    words: Words
    grammar: Grammar
    cpu_s: float
    most_bytes: int


class _Verdict(msgspec.Struct, frozen=True, array_like=True):
    """Why it cannot be compiled, "" if it can; and the bytes that it takes, compiled."""

    problem: str
    size: int = 0


def words(tokens: list[bytes], ends: frozenset[int]) -> Words:
    """tokens: as `grammar_library.vocabulary` takes them."""
    kept = {i: token for i, token in enumerate(tokens) if len(token) == 1 or token[:1] == NO_TEXT}
    return Words(len(tokens), sorted(ends), kept)


class Trials:
    """Workers, each of which tries one grammar at a time: as many as threads ask at once. From any thread."""

    def __init__(self, cpu_s: float = CPU_S, most_bytes: int = MOST_BYTES, wall_s: float = WALL_S) -> None:
        self._limits = cpu_s, most_bytes
        self._wall_s = wall_s
        self._lock = threading.Lock()
        self._idle: list[subprocess.Popen[bytes]] = []

    def run(self, words: Words, grammar: Grammar) -> int:
        """Try a grammar. Returns the bytes that it takes once compiled. Raises GrammarError, also where it would take
        too much time or memory; GrammarBusyError where no worker says anything."""
        if not hasattr(os, "fork"):
            return 0
        try:
            worker, verdict = self._tried(_Job(words, grammar, *self._limits))
        except OSError as error:
            raise GrammarBusyError(f"no process to try this grammar in: {error}; try again") from None
        with self._lock:
            keep = len(self._idle) < IDLE
            if keep:
                self._idle.append(worker)
        if not keep:
            _end(worker)
        if verdict.problem:
            raise GrammarError(verdict.problem)
        return verdict.size

    def _tried(self, job: _Job) -> tuple[subprocess.Popen[bytes], _Verdict]:
        """By which worker, and what it says. Raises OSError."""
        with self._lock:
            worker = self._idle.pop() if self._idle else None
        if worker is not None:
            try:
                return worker, self._asked(worker, job)
            except TimeoutError:  # a second one would have the caller wait as long again
                raise
            except OSError:
                pass  # an idle worker may have been killed: another one is started
        worker = _started()
        return worker, self._asked(worker, job)

    def _asked(self, worker: subprocess.Popen[bytes], job: _Job) -> _Verdict:
        """Raises OSError where the worker cannot answer, TimeoutError where it does not in time; then it is ended."""
        late = threading.Event()
        try:
            with _within(self._wall_s, worker, late):
                _write(worker.stdin, job)
                return _read(worker.stdout, _Verdict)
        except BaseException as error:
            _end(worker)
            if late.is_set() and isinstance(error, OSError):
                raise TimeoutError(f"it said nothing for {self._wall_s:g} s") from None
            raise

    def close(self) -> None:
        """End the idle workers."""
        with self._lock:
            idle, self._idle = self._idle, []
        for worker in idle:
            _end(worker)


TRIALS = Trials()  # of all vocabularies of this process
atexit.register(TRIALS.close)


def _started() -> subprocess.Popen[bytes]:
    code = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        # Ctrl-C is for this process; the end of the pipe ends the worker. And it is killed with its child (`_kill`).
        start_new_session=True,
    )


@contextlib.contextmanager
def _within(seconds: float, worker: subprocess.Popen[bytes], late: threading.Event) -> Iterator[None]:
    """Kill the worker after that time: its pipes, which this process may be waiting at, end with it. `late` says so."""

    def end() -> None:
        late.set()
        _kill(worker)

    clock = threading.Timer(seconds, end)
    clock.daemon = True
    clock.start()
    try:
        yield
    finally:
        clock.cancel()
        clock.join()  # no kill comes after the worker's end, when its number may be another's


def _kill(worker: subprocess.Popen[bytes]) -> None:
    """With its child, which may be what is stuck, and which has the pipes as well."""
    with contextlib.suppress(OSError):
        os.killpg(worker.pid, signal.SIGKILL)


def _end(worker: subprocess.Popen[bytes]) -> None:
    _kill(worker)
    for pipe in (worker.stdin, worker.stdout):
        with contextlib.suppress(OSError):  # what could not be written
            pipe.close()  # type: ignore[union-attr]
    worker.wait()


def _write(pipe: IO[bytes] | None, message: _Job | _Verdict) -> None:
    data = msgspec.msgpack.encode(message)
    pipe.write(_LENGTH.pack(len(data)) + data)  # type: ignore[union-attr]
    pipe.flush()  # type: ignore[union-attr]


def _read(pipe: IO[bytes] | None, kind: type[T]) -> T:
    """Raises OSError where there is no more, or not all of it."""
    head = pipe.read(_LENGTH.size)  # type: ignore[union-attr]
    if len(head) == _LENGTH.size:
        (size,) = _LENGTH.unpack(head)
        data = pipe.read(size)  # type: ignore[union-attr]
        if len(data) == size:
            return msgspec.msgpack.decode(data, type=kind)
    raise BrokenPipeError("the worker has ended")


# --- in the worker


def main() -> None:
    """Try grammars until the pipe ends."""
    jobs, verdicts = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    known: Words | None = None
    while True:
        try:
            job = _read(jobs, _Job)
        except OSError:
            return
        if job.words != known:
            known = job.words
            tokens = [known.tokens.get(i, b"") for i in range(known.n_vocab)]
            made = vocabulary(tokens, known.ends, lambda text: list(text.encode()))
        child = os.fork()
        if not child:
            _try(made, job, verdicts)
        _, status = os.waitpid(child, 0)
        if status:
            _write(verdicts, _Verdict(_too_much(job, status)))


def _try(made: object, job: _Job, verdicts: IO[bytes]) -> None:
    """In the child, which ends here."""
    import resource

    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # Rust's last words
    before = _data()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if before:
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]  # the operator's, which cannot be raised
        most = before + job.most_bytes
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    signal.setitimer(signal.ITIMER_PROF, job.cpu_s)  # SIGPROF ends it, wherever it is
    try:
        try:
            matcher = compiled(made, job.grammar)
            verdict = _Verdict("", max(0, _data() - before))
            del matcher
        except GrammarError as error:
            verdict = _Verdict(str(error))
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        _write(verdicts, verdict)
    except BaseException:  # out of memory: nothing was written, and the worker says so
        os._exit(1)
    os._exit(0)


def _too_much(job: _Job, status: int) -> str:
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGPROF:
        what = f"{job.cpu_s:g} s of a processor"
    else:
        what = f"{job.most_bytes >> 20} MiB of memory"
    found = [word for word in _COSTLY if f'"{word}"' in job.grammar.source]
    if not found:
        found = [name for sign, name in (("&", "&"), ("{", "repetitions")) if sign in job.grammar.source]
    has = f"; it has {', '.join(found)}" if found else ""
    return f"this grammar takes more than {what} to compile{has}"


def _data() -> int:
    """Bytes of this process's data and stack, as RLIMIT_DATA counts them; 0 where the system does not say."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[5]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
