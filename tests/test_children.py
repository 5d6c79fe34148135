"""Whatever happens to the parent, its children end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from waiting import PATIENCE_S, eventually
from wisp import children as module
from wisp.children import Child, ChildError, Children, free_ports

SLEEP = "import time; print('here', flush=True); time.sleep(600)"
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + SLEEP


@pytest.fixture(autouse=True)
def logs_stay_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_for(path: Path, text: str) -> None:
    eventually(lambda: text in path.read_text())


def test_children_end_with_the_block_and_take_their_logs_along() -> None:
    with Children() as children:
        child = children.start("one", ["-c", SLEEP], 1)
        wait_for(child.log, "here")
    assert child.process.returncode == -signal.SIGTERM
    assert not children.folder.exists()


def test_an_error_ends_them_too_and_leaves_the_logs() -> None:
    def work() -> None:
        with Children() as children:
            started.append(children.start("one", ["-c", SLEEP], 1))
            wait_for(started[0].log, "here")
            raise ValueError("oops")

    started: list[Child] = []
    with pytest.raises(ValueError, match="oops"):
        work()
    [child] = started
    assert child.process.returncode == -signal.SIGTERM
    assert child.log.read_text() == "here\n"


def test_one_that_ignores_the_request_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STOP_S", 0.1)
    with Children() as children:
        child = children.start("stubborn", ["-c", STUBBORN], 1)
        wait_for(child.log, "here")
    assert child.process.returncode == -signal.SIGKILL


def test_one_that_dies_early_is_quoted() -> None:
    dying = "import sys; print('no model'); sys.exit(2)"
    with Children() as children, httpx.Client(trust_env=False) as client:
        other = children.start("other", ["-c", SLEEP], 1)
        child = children.start("verifier", ["-c", dying], free_ports(1)[0])
        with pytest.raises(ChildError, match=r"the verifier ended with status 2.*\n    no model"):
            child.wait_healthy(client)
    assert other.process.poll() is not None


def test_one_that_never_gets_ready_is_reported() -> None:
    with Children() as children, httpx.Client(trust_env=False) as client:
        child = children.start("verifier", ["-c", SLEEP], free_ports(1)[0])
        with pytest.raises(ChildError, match="not ready after 0 s"):
            child.wait_healthy(client, timeout_s=0.2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_parent_ends_its_children(number: signal.Signals) -> None:
    parent_code = (
        "import signal, time\n"
        "from wisp.children import Children\n"
        # A shell starts what runs in its background with Ctrl-C ignored; here it is to count.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "with Children() as children:\n"
        f"    child = children.start('one', ['-c', {SLEEP!r}], 1)\n"
        "    print(child.process.pid, flush=True)\n"
        "    time.sleep(600)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", parent_code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert is_alive(pid)
        parent.send_signal(number)
        assert parent.wait(PATIENCE_S) != 0
    assert not is_alive(pid)


def test_children_do_not_inherit_settings_of_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WISP_SERVE_BATCHING", "nonsense")
    monkeypatch.setenv("WISP_API_KEYS", "secret")
    monkeypatch.setenv("WISP_CACHE", "/models")
    show = "import os; print(sorted(k for k in os.environ if k.startswith('WISP_')))"
    with Children() as children:
        child = children.start("one", ["-c", show], 1)
        child.process.wait(PATIENCE_S)
        assert child.log.read_text() == "['WISP_CACHE']\n"


def test_free_ports_are_different() -> None:
    assert len(set(free_ports(5))) == 5


TOLD = """
import asyncio, os, signal, sys
import uvloop
from wisp.children import Children, run_beside

class Told(asyncio.Protocol):
    def data_received(self, data):
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(1000):
            pass

class Speaking(asyncio.Protocol):
    def connection_made(self, transport):
        transport.write(b"x")

async def main():
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Speaking, "127.0.0.1", 0)
    await loop.create_connection(Told, *server.sockets[0].getsockname())
    try:
        await asyncio.Event().wait()
    finally:
        print("unwound", flush=True)

factory = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}[sys.argv[1]]
with Children(), asyncio.Runner(loop_factory=factory) as runner:
    run_beside(runner, main())
"""


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_a_signal_unwinds_an_event_loop_wherever_it_is(loop: str) -> None:
    """uvloop takes an exception of a callback for the fault of the connection that it was called for."""
    pytest.importorskip("uvloop")
    found = subprocess.run(
        [sys.executable, "-c", TOLD, loop], check=False, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert (found.returncode, found.stdout) == (128 + signal.SIGTERM, "unwound\n"), found.stderr
