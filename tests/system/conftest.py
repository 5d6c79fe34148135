"""The fixtures of `system_fixtures`. A checker of types takes each name of a file but once, and `conftest` is taken."""

from __future__ import annotations

from system_fixtures import fleet, pytest_runtest_makereport, shared, tiny_pair

__all__ = ["fleet", "pytest_runtest_makereport", "shared", "tiny_pair"]
