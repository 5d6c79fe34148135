"""Who imports whom: `core` is pure and knows nobody else, a server carries no simulator, the package no benchmark.

Imports are read from the source, also those inside functions.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import wisp

SOURCE = Path(wisp.__file__).parent

# What each folder may import of wisp besides itself. `wisp` itself holds the version;
# `children` starts processes, `outputs` are the files of a command, `progress` shows a bar.
CORE = {
    "core.protocol": {"core.errors"},
    "core.draft": {"core.protocol", "core.errors"},
    "core.history": set[str](),
    "core.verify": {"core.protocol", "core.history", "core.errors"},
    "core.route": {"core.verify", "core.errors"},
    "core.errors": set[str](),
}
DECIDES = set(CORE)
FOLDERS = {
    **CORE,
    "engines": DECIDES,
    "api": DECIDES | {"engines"},
    "server": DECIDES | {"engines", "api"},
    "edge": DECIDES | {"engines", "api"},
    "router": DECIDES | {"engines", "api", "server", "edge"},
    "calibrate": DECIDES | {"engines", "api", "outputs", "progress"},
    "sim": DECIDES | {"engines", "api", "edge", "calibrate", "children", "outputs", "progress"},
    "check": DECIDES
    | {"engines", "api", "server", "edge", "router", "sim", "children", "outputs", "progress"},
    "children": {"core.errors"},
    "outputs": {"core.errors"},
    "progress": set[str](),
}
# Modules of Python's own by which `core` could do I/O, read a clock or start a thread.
IMPURE = {"asyncio", "io", "logging", "os", "pathlib", "queue", "socket", "subprocess", "threading", "time"}


def folder(module: str) -> str:
    """The part of wisp that a module belongs to: wisp.core.draft.drafter is of core.draft."""
    parts = module.split(".")[1:]
    return ".".join(parts[: 2 if parts[:1] == ["core"] else 1])


def modules() -> dict[str, Path]:
    """Every module of wisp."""
    found = {}
    for path in SOURCE.rglob("*.py"):
        parts = path.relative_to(SOURCE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imported(path: Path) -> frozenset[str]:
    """The modules that a file names in imports, wherever they stand."""
    return frozenset(_imported(ast.parse(path.read_text())))


def _imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module or ""
            yield from (f"{node.module}.{name.name}" for name in node.names)


def reached(start: str) -> set[str]:
    """All modules of wisp that one may import in the end.

    `wisp.cli` is left out: it lists all commands, each of which imports what it needs when it runs.
    """
    known, seen, todo = modules(), set[str](), [start]
    while todo:
        module = todo.pop()
        if module in known and module not in seen and module != "wisp.cli":
            seen.add(module)
            todo += imported(known[module])
            parent, _, _ = module.rpartition(".")
            todo.append(parent)  # whose __init__ runs first
    return seen


def test_there_is_something_to_look_at() -> None:
    assert len(modules()) > 150
    assert "wisp.core.verify.verifier" in reached("wisp.cli.serve")
    assert "wisp.sim.simulate" in reached("wisp.cli.research")  # which is imported inside a function


@pytest.mark.parametrize("of", FOLDERS)
def test_a_folder_imports_what_it_may(of: str) -> None:
    for module, path in modules().items():
        if folder(module) != of:
            continue
        others = {folder(name) for name in imported(path) & modules().keys()} - {of, "core", ""}
        assert others <= FOLDERS[of], f"{module} imports {', '.join(sorted(others - FOLDERS[of]))}"


def test_every_folder_has_its_rule() -> None:
    assert {folder(module) for module in modules()} == {*FOLDERS, "cli", "core", ""}


def test_core_does_no_io_reads_no_clock_and_starts_no_thread() -> None:
    for module, path in modules().items():
        if folder(module) in CORE:
            used = {name.partition(".")[0] for name in imported(path)} & IMPURE
            assert not used, f"{module} imports {', '.join(sorted(used))}"


@pytest.mark.parametrize("command", ["wisp.cli.serve", "wisp.cli.device", "wisp.router.replica"])
def test_a_server_and_an_edge_reach_no_simulator_and_no_check(command: str) -> None:
    """Not even inside a function."""
    assert not {folder(module) for module in reached(command)} & {"sim", "check"}


def test_the_package_imports_no_benchmark_and_no_tool() -> None:
    for module, path in modules().items():
        outside = {name.partition(".")[0] for name in imported(path)} & {"benchmarks", "tools"}
        assert not outside, f"{module} imports {outside}"


def test_a_process_that_serves_has_loaded_none_of_it() -> None:
    script = (
        "import sys, wisp.cli, wisp.cli.serve, wisp.cli.device\n"
        "import wisp.server.app, wisp.router.command, wisp.edge.app, wisp.engines.build\n"
        "print([m for m in sys.modules if m.split('.')[0] in ('benchmarks', 'tools', 'matplotlib', 'sklearn')"
        " or m.startswith(('wisp.sim', 'wisp.check', 'wisp.calibrate'))])"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "[]"
