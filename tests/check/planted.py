"""Defects of one line, planted in the product's source as it is imported, for checks to find.

    python tests/check/planted.py NAME SEEDS      run `check-faults` on it: seeds to detection, as JSON
    python tests/check/planted.py NAME SEEDS FILE and write the plan, made shorter, that shows it
    PLANTED=NAME python -m pytest ...             with `tests/check` on PYTHONPATH: run other tests on it

The last goes through `sitecustomize.py` beside this file, also in the processes that tests start: these keep nothing
of the environment whose name begins with WISP_.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple


class Defect(NamedTuple):
    """In `module`, `right` became `wrong`. `right` stands there once."""

    part: str
    module: str
    right: str
    wrong: str


VERIFIER, SESSION, KV = "wisp.core.verify.verifier", "wisp.core.verify.session", "wisp.core.verify.kv"
REGISTRY, STATES, RESULTS = "wisp.core.verify.registry", "wisp.core.verify.states", "wisp.core.verify.results"
DRAFTER, ITINERARY = "wisp.core.draft.drafter", "wisp.core.draft.itinerary"
PLANNER = "wisp.core.verify.planner"
FLEET, ROUTER, BACKEND, LINK = "wisp.router.fleet", "wisp.router.host", "wisp.edge.backend", "wisp.edge.link"
HOST, PLACES, IN_FLIGHT, CHAIN = (
    "wisp.server.host",
    "wisp.core.verify.places",
    "wisp.core.verify.in_flight",
    "wisp.core.draft.chain",
)

_ORPHANS_REST = "\n        E.CANCEL: S.DOOMED,\n        E.FINISHED: S.ENDED,\n    },\n    S.DOOMED"
MOST_SEEDS = 150  # in which each must be found

DEFECTS: dict[str, Defect] = {
    # verifier
    "old_connection_parks": Defect(
        "verifier",
        VERIFIER,
        "set()).discard(session.handle)\n        session.connection, session.epoch",
        "set())\n        session.connection, session.epoch",
    ),
    "doomed_keeps_its_place": Defect(
        "verifier",
        REGISTRY,
        "            self.end(session)\n        else:\n            self._free(session)",
        "            self.end(session)",
    ),
    "lost_place_is_not_reported": Defect(
        "verifier",
        VERIFIER,
        '        else:\n            actions.append(Ended(session.id, "expired"))\n        self.registry.stop(session)',
        "        self.registry.stop(session)",
    ),
    "keys_of_lost_connections_stay": Defect(
        "verifier", HOST, "        self._keys.pop(connection, None)\n", ""
    ),
    "wait_outlives_its_step": Defect(
        "verifier",
        IN_FLIGHT,
        "        self._ended, self.waiting = now, False\n",
        "        self._ended = now\n",
    ),
    "ended_sessions_count_in_slo_admission": Defect(
        "verifier", REGISTRY, "        self.slo_admission.left(session)\n", ""
    ),
    # session
    "resumed_in_step_keeps_result": Defect(
        "session",
        SESSION,
        "            self.flight.drop()  # these slices began at the end of a shorter chain",
        "            pass",
    ),
    "orphan_is_not_taken_back": Defect(
        "session",
        STATES,
        "E.RESUMED: S.RUNNING," + _ORPHANS_REST,
        "E.RESUMED: S.ORPHANED," + _ORPHANS_REST,
    ),
    # KV
    "salts_share": Defect(
        "KV",
        KV,
        "self._beginnings.get((key, chain[0]), ()) if chain else ()",
        "[i for (k, t), at in self._beginnings.items() for i in at if chain and (k[0], t) == (key[0], chain[0])]",
    ),
    "lost_kv_is_thought_cached": Defect(
        "KV",
        PLANNER,
        "        session.slot, session.cached = None, 0\n        self.evicted += 1",
        "        session.slot = None\n        self.evicted += 1",
    ),
    "evicted_owner_is_not_told": Defect(
        "KV",
        PLANNER,
        "(needed, self._keepers(idle, grants)) or ():\n            self._lose_kv(handle)",
        "(needed, self._keepers(idle, grants)) or ():\n            pass",
    ),
    "orphans_are_silent": Defect(
        "KV",
        PLACES,
        "return session.state is PARKED or (",
        "return session.connection < 0 or (",
    ),
    "copies_wait_in_the_books": Defect(
        "KV",
        PLANNER,
        "        if not grants and self.in_flight.steps:\n            self._withdraw_copies()\n",
        "",
    ),
    "failed_slice_is_thought_cached": Defect(
        "KV",
        RESULTS,
        "            self.kv.record(now, s.slot, [])\n            s.cached = 0\n",
        "            self.kv.record(now, s.slot, [])\n",
    ),
    # drafter
    "refusal_of_the_opening_is_ignored": Defect(
        "drafter",
        DRAFTER,
        "0 <= refused.round < opening.round:",
        "0 <= refused.round <= opening.round:",
    ),
    "drafts_said_on_the_way_are_lost": Defect(
        "drafter", ITINERARY, "            self._since.append(message)", "            self._since = []"
    ),
    "served_before_the_loss": Defect(
        "drafter",
        DRAFTER,
        "        rounds.serve = serve = self.policy is None\n",
        "        serve = self.policy is None\n",
    ),
    "replaced_drafts_are_waited_for": Defect(
        "drafter",
        CHAIN,
        "                del self.flights[: i + 1]\n",
        "                del self.flights[i]\n",
    ),
    # what carries out what the drafter decides
    "home_is_still_listened_to": Defect(
        "edge",
        BACKEND,
        "        self.link.unlisten(self.id)\n        self.link = link\n",
        "        if self.link is not self.home:\n            self.link.unlisten(self.id)\n        self.link = link\n",
    ),
    "departure_is_not_reported": Defect(
        "edge",
        BACKEND,
        "        if not self.finished:  # left",
        "        if not self.generation:  # left",
    ),
    "dead_link_is_used_again": Defect(
        "edge",
        LINK,
        "        self._links = {a: link for a, link in self._links.items() if not link.ended}\n",
        "",
    ),
    # router
    "gone_replica_is_remembered": Defect("router", FLEET, "            self._placement.gone(r.name)\n", ""),
    "placements_at_the_dead_count": Defect(
        "router",
        ROUTER,
        "        self._recent = {name: placed for name, placed in self._recent.items() if name in up}\n",
        "",
    ),
    "reports_of_the_dead_count": Defect(
        "router",
        ROUTER,
        "        self._usage = {name: keys for name, keys in self._usage.items() if name in up}\n",
        "",
    ),
    "placements_stay_recent": Defect(
        "router",
        ROUTER,
        "        while recent and recent[0][0] < now - SETTLE_S:",
        "        while recent and recent[0][0] < now - 1e9:",
    ),
    "looks_are_kept": Defect(
        "router", ROUTER, "            task.add_done_callback(self._looks.discard)\n", ""
    ),
    "edges_are_not_let_go": Defect(
        "router",
        ROUTER,
        "            if c.close is not None:\n                c.close()",
        "            pass",
    ),
}


class _Planting(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds one module, and compiles it with the defect in it."""

    def __init__(self, defect: Defect) -> None:
        self.defect = defect
        self.spec: importlib.machinery.ModuleSpec | None = None

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != self.defect.module:
            return None
        self.spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert self.spec is not None
        return importlib.util.spec_from_loader(name, self, origin=self.spec.origin)

    def exec_module(self, module: ModuleType) -> None:
        assert self.spec is not None
        assert isinstance(self.spec.loader, importlib.machinery.SourceFileLoader)
        source = self.spec.loader.get_source(module.__name__)
        assert source is not None
        assert source.count(self.defect.right) == 1, f"{self.defect.right!r} is not there once"
        module.__file__ = self.spec.origin
        code = compile(source.replace(self.defect.right, self.defect.wrong), str(self.spec.origin), "exec")
        exec(code, module.__dict__)


def plant(name: str) -> None:
    """From now on the module with this defect is imported with it. Nothing of `wisp` may have been imported before."""
    assert DEFECTS[name].module not in sys.modules
    sys.meta_path.insert(0, _Planting(DEFECTS[name]))


def main(name: str, seeds: int, out: str = "") -> None:
    """Print how many seeds `check-faults` needs, and what it says."""
    plant(name)
    from wisp.check.faults.plan import plan_of
    from wisp.check.faults.shrink import shrink, write_case
    from wisp.check.faults.world import run_plan

    for seed in range(seeds):
        outcome = run_plan(plan_of(seed))
        if outcome.found is not None:
            found = {"name": name, "seeds": seed + 1, "what": outcome.found.what.split("\n")[0]}
            if out:
                short = shrink(plan_of(seed), outcome.found)
                write_case(Path(out), short, outcome.found)
                found["events"] = len(short.events)
            print(json.dumps(found))
            return
    print(json.dumps({"name": name, "seeds": None, "what": f"not found in {seeds}"}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
