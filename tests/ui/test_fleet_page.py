"""The page of a verifier under an emulated fleet, of a router, and of a run that is over."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from harness import Fleet, Process
from ui_harness import CUT_OFF, REFUSED
from wisp.sim.scenario import load_scenario
from wisp.sim.serving import serve_arguments
from wisp.sim.systems import system

pytestmark = pytest.mark.ui

KEYS = '[keys.root]\nsecret = "root-secret"\nadmin = true\n\n[keys.bob]\nsecret = "bob-secret"\n'
FLEET = ("sim", "fleet", "mixed", "--devices", "12", "--warmup", "1", "--window", "3600")


@pytest.fixture(scope="module")
def served(fleet: Fleet) -> Iterator[Process]:
    """The verifier of `mixed`, and twelve devices of it at work."""
    words = serve_arguments(load_scenario("mixed"), system("wisp"), 0, fleet.folder)[3:]
    at = words.index("--target")
    target = words[at + 1]
    flags = [w for i, w in enumerate(words) if i not in (at, at + 1)]
    for name in ("--engine", "--port"):
        i = flags.index(name)
        del flags[i : i + 2]
    process = fleet.serve(
        *flags, "--event-log", str(fleet.folder / "events"), target=target, engine="emulated"
    )
    command = [sys.executable, "-m", "wisp.cli", *FLEET, "--server", process.url]
    devices = subprocess.Popen(
        command, env=fleet.environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    yield process
    devices.kill()
    devices.wait()


def test_attainment_can_be_read_while_a_fleet_is_at_work(served: Process, visit: Callable[..., Any]) -> None:
    page = visit(f"{served.url}/", viewport={"width": 1160, "height": 1000})
    ended = "() => /of ([6-9]|\\d\\d)/.test(document.querySelector('[data-testid=attainment]')?.textContent || '')"
    page.wait_for_function(ended)
    shown = page.get_by_test_id("attainment").inner_text()
    assert 0 < float(re.findall(r"[\d.]+", shown)[0]) <= 100
    assert page.get_by_test_id("class").count() == 2, "two kinds of users"
    devices = page.get_by_role("region", name="Devices, as a table").locator("tbody tr")
    assert devices.count() == 12
    page.wait_for_function("() => document.querySelectorAll('[role=img]').length === 10")
    label = page.get_by_role("img", name=re.compile("Committed tokens: committed [1-9]"))
    label.wait_for()
    assert page.get_by_role("region", name="Sessions now, as a table").locator("tbody tr").count() > 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_works_on_a_narrow_screen(served: Process, visit: Callable[..., Any], scheme: str) -> None:
    page = visit(f"{served.url}/", viewport={"width": 400, "height": 800}, color_scheme=scheme)
    page.get_by_test_id("attainment").wait_for()
    page.get_by_role("img").first.wait_for()
    assert page.evaluate("document.scrollingElement.scrollWidth") <= 400


def test_a_killed_verifier_is_told_of(fleet: Fleet, visit: Callable[..., Any]) -> None:
    server = fleet.serve(target="null", engine="null")
    page = visit(f"{server.url}/", expected=CUT_OFF)
    page.get_by_text("Nothing has happened yet").wait_for()
    page.get_by_text("No device is connected").wait_for()
    server.terminate()
    page.get_by_test_id("trouble").wait_for()
    server.wait()
    page.get_by_text("no answer", exact=True).wait_for()


def test_the_fleet_is_shown_to_an_admins_key_alone(fleet: Fleet, visit: Callable[..., Any]) -> None:
    keys = fleet.folder / "keys.toml"
    keys.write_text(KEYS)
    server = fleet.serve("--api-keys", str(keys), target="null", engine="null")
    page = visit(f"{server.url}/", expected=REFUSED)
    for key, said in (("wrong", "not known here"), ("bob-secret", "admin = true")):
        page.get_by_role("textbox", name="API key").fill(key)
        page.get_by_role("button", name="Continue").click()
        page.get_by_role("alert").get_by_text(said).wait_for()
        assert page.get_by_test_id("attainment").count() == 0
    page.get_by_role("textbox", name="API key").fill("root-secret")
    page.get_by_label("Keep it until this tab is closed").check()
    page.get_by_role("button", name="Continue").click()
    page.get_by_test_id("attainment").wait_for()
    assert page.url == f"{server.url}/"
    page.reload()
    page.get_by_test_id("attainment").wait_for()


# In the table of replicas: both are up; and r1 has ended once before.
CHIPS = "[...document.querySelectorAll('td .chip')]"
ROWS = "[...document.querySelectorAll('tr')]"
BOTH_UP = f"() => {CHIPS}.filter((c) => c.textContent === 'up').length === 2"
AGAIN = f"() => ({BOTH_UP})() && {ROWS}.some((r) => /^r1up.*exit status/.test(r.textContent))"


def test_a_replica_is_restarted_and_drained_from_the_page(fleet: Fleet, visit: Callable[..., Any]) -> None:
    router = fleet.serve("--replicas", "2", target="null", engine="null")
    page = visit(f"{router.url}/")
    page.on("dialog", lambda dialog: dialog.accept())
    page.wait_for_function(BOTH_UP)
    page.get_by_role("button", name="Restart r1").click()
    page.get_by_text("r1: restart done.").wait_for()
    page.wait_for_function(AGAIN)
    page.get_by_role("button", name="Drain r2").click()
    page.get_by_text("r2: drain done.").wait_for()
    page.get_by_role("button", name="Drain r2").wait_for(state="detached")


def test_a_simulated_run_and_an_event_log_are_pages_of_their_own(
    fleet: Fleet,
    served: Process,
    visit: Callable[..., Any],
    picture: Callable[[Any, str], None],
    tmp_path: Path,
) -> None:
    run, log = tmp_path / "run.html", tmp_path / "log.html"
    made = fleet.run("sim", "run", "mixed", "--html", str(run))
    assert made.returncode == 0, made.stderr
    made = fleet.run("sim", "log", str(fleet.folder / "events"), "--html", str(log))
    assert made.returncode == 0, made.stderr
    for path in (run, log):
        page = visit(f"file://{path}", viewport={"width": 1160, "height": 1000})
        assert "%" in page.get_by_test_id("attainment").inner_text()
        assert page.get_by_role("img").count() == 10
        assert page.get_by_role("region", name="Devices, as a table").locator("tbody tr").count() >= 6
        if path is run:  # whatever else this machine does, it looks the same
            picture(page, "fleet")
