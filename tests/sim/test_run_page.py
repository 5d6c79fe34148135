"""A simulated run as a page."""

from __future__ import annotations

import json
import re
from pathlib import Path

import msgspec

from wisp.sim.page import ROWS, RunPage, row_s
from wisp.sim.report import report
from wisp.sim.scenario import load_scenario
from wisp.sim.simulate import Simulation
from wisp.sim.systems import system


def test_the_page_of_a_run_holds_its_figures_devices_and_sessions(tmp_path: Path) -> None:
    mixed = msgspec.structs.replace(load_scenario("mixed"), devices_n=4, warmup_s=1.0, window_s=8.0)
    simulation = Simulation(mixed, system("wisp"), 1, row_s=row_s(mixed))
    page = RunPage(simulation)
    simulation.run()
    found = report(simulation)
    page.write(tmp_path / "run.html", found)
    text = (tmp_path / "run.html").read_text()
    (data,) = re.findall(r'<script type="application/json" id="run">(.*?)</script>', text, re.DOTALL)
    run = json.loads(data)
    assert (run["kind"], run["clock"], run["window"]) == ("run", "run", [1.0, 9.0])
    assert run["attainment"] == found.attainment
    assert run["n_devices"] == 4
    assert all(d["name"] and d["draft_per_s"] for d in run["devices"])
    assert 0 < run["n_sessions"] == len(run["sessions"]), "as at the end of the window: now all are over"
    assert sum(run["series"]["tokens_per_s"]) * run["width_s"] >= found.total_output_tokens
    assert len(run["series"]["t"]) <= ROWS
    plain = Simulation(mixed, system("wisp"), 1)
    plain.run()
    assert report(plain) == found, "looking on changes nothing"
