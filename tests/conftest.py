"""What holds for all tests: examples that are the same in every run, and no limit of time on any of them."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

collect_ignore = ["clients"]  # in an environment of their own: `make test-clients`

# A busy machine is slow at random moments, so no example may be late, and a slow one is no reason to fail.
# `pytest --hypothesis-profile=default` tries others than the usual examples.
settings.register_profile(
    "wisp",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("wisp")

# A shell that starts this in the background has it ignore Ctrl-C, and so would each process that a test sends one to.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of whole processes first: they take the longest, and with several workers none should begin last."""
    items.sort(key=lambda item: item.path.parent.name != "system")


@pytest.fixture(autouse=True)
def _no_log_handlers_left_behind() -> Iterator[None]:
    """A command that is run in this process logs to a stream that is closed once its test is over."""
    root = logging.getLogger()
    before = root.handlers[:]
    yield
    for handler in root.handlers[:]:
        if type(handler) is logging.StreamHandler and handler not in before:
            root.removeHandler(handler)
