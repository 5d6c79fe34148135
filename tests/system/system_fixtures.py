"""Fixtures of whole processes; when a test fails, the logs of its processes are shown."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from harness import DRAFT, TARGET, Fleet
from wisp.engines.models import is_cached

_FLEETS: list[Fleet] = []


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    """Processes of one test."""
    yield from _fleet(tmp_path)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Processes of one module."""
    yield from _fleet(tmp_path_factory.mktemp("shared"))


@pytest.fixture(scope="session")
def tiny_pair() -> None:
    """Skips where the pair that ships with the package is not built yet."""
    for name in (TARGET, DRAFT):
        if not is_cached(name):
            pytest.skip(f"{name} is not there")


def _fleet(folder: Path) -> Iterator[Fleet]:
    with Fleet(folder) as fleet:
        _FLEETS.append(fleet)
        yield fleet
        _FLEETS.remove(fleet)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):  # type: ignore[no-untyped-def]
    report = yield
    if report.failed:
        for fleet in _FLEETS:
            for process in fleet.processes:
                log = "\n".join(process.log().splitlines()[-40:])
                report.sections.append((f"log of {process.name} ({process.popen.poll()})", log))
    return report
