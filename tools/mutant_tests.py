"""The tests of one mutant: those that reach the changed line, the fastest first, up to the first that fails.

Each mutant has a process of its own. Where the change is within a function, that is a fork of one that has collected
all tests (`Runner`), and the function gets its new code. For other changes it is a fork of one that has imported
everything but our own code (`start`), and gets the changed module. No file is changed.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import json
import os
import resource
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import coverage
import pytest
from hypothesis import Phase, settings

TESTS = "tests/core"
MANY = 1.5  # times what the tests take as they are recorded, which is twice of what they take otherwise
SPARE_CPU_S = 3.0  # for imports
WALL_S = 3600  # for a mutant that waits instead of running
MEMORY = 4 << 30  # bytes of address space
# This process has imported hypothesis before pytest could prepare it.
OPTIONS = ("-q", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning")
OURS = ("wisp", "tests", "conftest", "tools", "__main__", "__mp_main__")

Record = dict[str, Any]


@dataclass(frozen=True)
class Reach:
    """What the tests do without a mutant.

    lines: by file and line, the tests that run it. seconds: of each test, on a core. modules: what they import
    """

    lines: Mapping[str, Mapping[int, frozenset[str]]]
    seconds: Mapping[str, float]
    modules: Sequence[str]

    def tests(self, file: str, lines: range | None) -> list[str]:
        """Those that run any of `lines`, or any line of the file (None); the fastest first."""
        by_line = self.lines.get(file, {})
        found = (names for line, names in by_line.items() if lines is None or line in lines)
        return sorted(frozenset().union(*found), key=lambda test: (self.seconds[test], test))


def recorded(files: Sequence[str], folder: Path, state: str) -> Reach:
    """Run the tests once, in a fork, for each `state` of code and tests. Raises SystemExit if any of them fails."""
    to = folder / f"reach-{state}.json"
    if not to.exists():
        _run_recording(files, folder, to)
    told = json.loads(to.read_text())
    if not any(told["lines"].values()):
        to.unlink()
        raise SystemExit("the tests ran, but reached none of these files: which `wisp` is installed?")
    lines = {
        file: {int(line): frozenset(names) for line, names in found.items()}
        for file, found in told["lines"].items()
    }
    return Reach(lines, told["seconds"], told["modules"])


def _run_recording(files: Sequence[str], folder: Path, to: Path) -> None:
    with (folder / "recording.log").open("wb") as log:
        pid = fork(lambda: _record(files, to), log.fileno())
        _, status = os.waitpid(pid, 0)
    if os.waitstatus_to_exitcode(status) or not to.exists():
        to.unlink(missing_ok=True)
        raise SystemExit(f"without a mutant the tests fail: see {folder / 'recording.log'}")


def _record(files: Sequence[str], to: Path) -> int:
    measured = coverage.Coverage(data_file=None, include=list(files), config_file=False)
    recorder = Recorder(measured)
    measured.start()
    try:
        code = pytest.main([TESTS, *OPTIONS], plugins=[recorder])
    finally:
        measured.stop()
    data = measured.get_data()
    lines = {
        file: {
            line: [name for name in names if name]
            for line, names in data.contexts_by_lineno(str(Path(file).absolute())).items()
        }
        for file in files
    }
    modules = [name for name in sys.modules if name.partition(".")[0] not in OURS and not _of_tests(name)]
    to.write_text(json.dumps({"lines": lines, "seconds": recorder.seconds, "modules": modules}))
    return int(code)


def _of_tests(module: str) -> bool:
    file = getattr(sys.modules[module], "__file__", None)
    return file is not None and Path(file).is_relative_to(Path.cwd() / "tests")


class Recorder:
    """A context for each test."""

    def __init__(self, measured: coverage.Coverage) -> None:
        self.measured = measured
        self.seconds: dict[str, float] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        self.measured.switch_context(item.nodeid)
        began = time.process_time()
        try:
            return (yield)
        finally:
            self.seconds[item.nodeid] = time.process_time() - began
            self.measured.switch_context("")


class Quick:
    """A failing example is not made smaller: that it fails is enough."""

    def pytest_configure(self) -> None:
        phases = (Phase.explicit, Phase.generate)
        settings.register_profile("mutants", settings.get_profile("wisp"), phases=phases)
        settings.load_profile("mutants")


class Chosen(Quick):
    """Some tests, in their order."""

    def __init__(self, tests: Sequence[str]) -> None:
        self.order = {test: i for i, test in enumerate(tests)}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = sorted((i for i in items if i.nodeid in self.order), key=lambda i: self.order[i.nodeid])


def prepare(modules: Sequence[str]) -> None:
    """Import what every mutant's tests would import again."""
    for name in modules:
        with contextlib.suppress(Exception):
            importlib.import_module(name)


def fork(work: Callable[[], int], output: int) -> int:
    """`work` in a process of its own, whose exit status it returns. Returns the process's id."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = int(pytest.ExitCode.INTERNAL_ERROR)
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        code = work()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def limited(cpu_s: float) -> None:
    """Bound what this process may take; `cpu_s`: what its tests take without a mutant. What takes more never ends."""
    limit = int(MANY * cpu_s + SPARE_CPU_S)
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    signal.alarm(WALL_S)


def start(mutant: Record, tests: Sequence[str], cpu_s: float, output: int) -> int:
    """The process that imports a mutant and runs `tests`, which take `cpu_s` without it. Returns its id."""
    return fork(lambda: _import_and_run(mutant, tests, cpu_s), output)


def _import_and_run(mutant: Record, tests: Sequence[str], cpu_s: float) -> int:
    limited(cpu_s)
    try:
        put(mutant["file"], mutant["source"])
    except Exception:
        return int(pytest.ExitCode.TESTS_FAILED)  # every test would fail to import it
    files = sorted({test.partition("::")[0] for test in tests})
    return int(pytest.main([*files, "-x", *OPTIONS], plugins=[Chosen(tests)]))


def put(file: str, source: str) -> None:
    """Have `source` instead of a module of ours."""
    name = module_of(file)
    parent, _, last = name.rpartition(".")
    module = ModuleType(name)
    module.__file__ = str(Path(file).absolute())
    module.__package__ = parent
    above = importlib.import_module(parent)
    sys.modules[name] = module
    exec(compiled(source, module.__file__), module.__dict__)
    setattr(above, last, module)


def module_of(file: str) -> str:
    return ".".join(Path(file).relative_to("src").with_suffix("").parts)


class Collected(Quick):
    """A pytest session that runs no tests but calls `work` with its `Runner`."""

    def __init__(self, work: Callable[[Runner], None]) -> None:
        self.work = work

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self.work(Runner(session))
        return True


class Runner:
    """Runs tests that are collected already, each time in a fork."""

    def __init__(self, session: pytest.Session) -> None:
        self.session = session
        self.items = {item.nodeid: item for item in session.items}

    def start(self, mutant: Record, tests: Sequence[str], cpu_s: float, output: int) -> int:
        """As `start`, for a mutant whose change is within one function."""
        return fork(lambda: self._run(mutant, tests, cpu_s), output)

    def _run(self, mutant: Record, tests: Sequence[str], cpu_s: float) -> int:
        limited(cpu_s)
        change = changed_function(mutant)
        assert change is not None
        function_at(module_of(mutant["file"]), change.co_qualname).__code__ = change
        items = [self.items[test] for test in tests]
        for item, following in zip(items, [*items[1:], None], strict=True):
            self.session.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if self.session.testsfailed:
                return int(pytest.ExitCode.TESTS_FAILED)
        return int(pytest.ExitCode.OK)


def collected(work: Callable[[Runner], None]) -> None:
    """Collect the tests in this process, and call `work`. Raises SystemExit if they cannot be."""
    code = pytest.main([TESTS, "-s", *OPTIONS], plugins=[Collected(work)])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise SystemExit(f"the tests were not collected: {code}")


# --- which function was changed


def changed_function(mutant: Record) -> CodeType | None:
    """The new code of the function within which the change is; None if it is elsewhere, as in a table or a default."""
    file = mutant["file"]
    return _difference(compiled(Path(file).read_text(), file), compiled(mutant["source"], file))


def compiled(source: str, file: str) -> CodeType:
    """A mutant may have `is` before a number: a warning, and for pytest an error, of which no test knows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        return compile(source, file, "exec")


def _difference(before: CodeType, after: CodeType) -> CodeType | None:
    """Of two modules or classes."""
    old, new = _inner(before), _inner(after)
    if _shape(before) != _shape(after) or len(old) != len(new):
        return None
    differing = [(a, b) for a, b in zip(old, new, strict=True) if a != b]
    if len(differing) != 1:
        return None
    a, b = differing[0]
    return b if b.co_flags & inspect.CO_NEWLOCALS else _difference(a, b)


def _inner(code: CodeType) -> list[CodeType]:
    return [const for const in code.co_consts if isinstance(const, CodeType)]


def _shape(code: CodeType) -> tuple[object, ...]:
    """What a module or a class does by itself."""
    consts = tuple((type(const), repr(const)) for const in code.co_consts if not isinstance(const, CodeType))
    return code.co_code, consts, code.co_names, code.co_qualname


def function_at(module: str, qualname: str) -> FunctionType:
    """Raises TypeError if there is none."""
    found: Any = sys.modules[module]
    for part in qualname.split("."):
        found = vars(found)[part]
    found = getattr(found, "fget", None) or getattr(found, "__func__", found)
    if not isinstance(found, FunctionType):
        raise TypeError(f"{qualname} is no function")
    return found


def outcome(status: int) -> str:
    """Of the process of a mutant, from its wait status. Raises ValueError where the tests could not be run."""
    code = os.waitstatus_to_exitcode(status)
    if code in (-signal.SIGXCPU, -signal.SIGALRM, -signal.SIGKILL):
        return "endless"
    if code == pytest.ExitCode.OK:
        return "survived"
    if code in (pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.INTERRUPTED):
        return "killed"
    raise ValueError(f"pytest ended with {code}")


# --- which lines a change belongs to


def lines_at(tree: ast.Module, line: int) -> range | None:
    """The lines of which a test must run one to see a change in `line`; None: it is seen by importing the file."""
    found: ast.stmt | None = None
    function = False
    inner: Sequence[ast.stmt] = tree.body
    while inner:
        at = next((s for s in inner if _first(s) <= line <= (s.end_lineno or s.lineno)), None)
        if at is None:
            break
        if found is not None and isinstance(found, ast.FunctionDef | ast.AsyncFunctionDef):
            function = True
        found, inner = at, _statements(at)
    if found is None:
        return None
    end = found.end_lineno or found.lineno
    if isinstance(found, ast.FunctionDef | ast.AsyncFunctionDef):
        return range(found.body[0].lineno, end + 1)  # a decorator or a default: seen by calling it
    if not function:
        return None
    body = _statements(found)
    return range(found.lineno, body[0].lineno if body and body[0].lineno > found.lineno else end + 1)


def _first(statement: ast.stmt) -> int:
    decorators: list[ast.expr] = getattr(statement, "decorator_list", [])
    return min((statement.lineno, *(d.lineno for d in decorators)))


def _statements(of: ast.stmt) -> list[ast.stmt]:
    blocks = (getattr(of, name, ()) for name in ("body", "handlers", "orelse", "finalbody"))
    return [
        s
        for block in blocks
        for each in block
        for s in (each.body if isinstance(each, ast.ExceptHandler) else [each])
    ]


def annotated(tree: ast.Module, line: int, column: int) -> bool:
    """Is this place in an annotation? They do not run."""
    for node in ast.walk(tree):
        for name in ("annotation", "returns"):
            note = getattr(node, name, None)
            if note is None:
                continue
            if (note.lineno, note.col_offset) <= (line, column) < (note.end_lineno, note.end_col_offset):
                return True
    return False
