"""In which thread an engine's steps run."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from wisp.engines.null import NullTarget
from wisp.server.engine_thread import _started


class Owner(NullTarget):
    """An engine that has a thread of its own, as vLLM's."""

    def __init__(self) -> None:
        super().__init__(slots=1)
        self.pool = ThreadPoolExecutor(1)
        self.own = self.pool.submit(threading.current_thread).result()

    def occupy(self, main: Callable[[], None]) -> Callable[[], None]:
        return self.pool.submit(main).result


def test_steps_run_in_the_engines_own_thread_where_it_has_one() -> None:
    seen: list[threading.Thread] = []
    engine = Owner()
    _started(engine, lambda: seen.append(threading.current_thread()), "engine")()
    assert seen == [engine.own]
    engine.pool.shutdown()


def test_steps_of_others_run_in_a_thread_of_the_servers() -> None:
    seen: list[str] = []
    _started(NullTarget(slots=1), lambda: seen.append(threading.current_thread().name), "engine")()
    assert seen == ["engine"]
