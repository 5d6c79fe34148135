"""What holds for all tests: examples that are the same in every run, and no limit of time on any of them."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

# A busy machine is slow at random moments, so no example may be late, and a slow one is no reason to fail.
# `pytest --hypothesis-profile=default` tries others than the usual examples.
settings.register_profile(
    "wisp",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("wisp")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of whole processes first: they take the longest, and with several workers none should begin last."""
    items.sort(key=lambda item: item.path.parent.name != "system")
