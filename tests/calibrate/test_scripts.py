"""Scripts: what the drafter says goes on from what it said before."""

from __future__ import annotations

from pathlib import Path

import pytest

from wisp.calibrate.traces.scripts import Scripts, library
from wisp.sim.scenario import load_scenario


@pytest.mark.parametrize("acceptance", [None, 0.7])
def test_a_drafter_departs_from_the_text_where_it_was_recorded_to(acceptance: float | None) -> None:
    found = library(Path(load_scenario("a100-qwen3-32b").traces))
    script = Scripts(found, (30, 60), acceptance).script(7)
    for base in range(len(script) + 1):
        chain: list[int] = []
        while (proposal := script.propose(base, len(chain))) is not None:
            chain.append(proposal[0])
        agreed = 0
        while (
            agreed < len(chain)
            and base + agreed < len(script)
            and chain[agreed] == script.tokens[base + agreed]
        ):
            agreed += 1
        at = base + agreed
        path = found.off.get(script.positions[at], []) if at < len(script) else []
        said = [found.draft[p] for p in script.positions[base : at + 1]]
        assert chain == [*said, *(token for token, _ in path)]
    assert script.propose(len(script), 5) is None
