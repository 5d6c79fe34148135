"""What a recorder says of a verifier: rows, devices, sessions, SLOs. Time is an argument."""

from __future__ import annotations

from typing import Any

import pytest

from wisp.api.pages.recorder import MOST_TARGETS, THIN, Recorder
from wisp.api.pages.series import COLUMNS, Second, Series, summed
from wisp.core.protocol.messages import Cancel, Device, Draft, Open
from wisp.core.protocol.sampling import Sampling
from wisp.core.protocol.slo import Slo
from wisp.core.protocol.step import SliceResult
from wisp.core.verify.admission import Admission
from wisp.core.verify.batching import batching_policy
from wisp.core.verify.cost import Coefficients, CostModel
from wisp.core.verify.events import EdgeLost, InEvent, Limits, Received, Run, StepDone, Tick
from wisp.core.verify.verifier import Verifier

CODING = Slo(1000.0, 100.0)
LIMITS = Limits(n_vocab=100, eos=frozenset({99}), slots=1, slot_tokens=64, kv_tokens=64, step_tokens=32)


class World:
    """A verifier whose engine commits each draft whole, driven by hand."""

    def __init__(self, **given: Any) -> None:
        cost = CostModel(Coefficients(step=10.0, token=1.0))
        self.verifier = Verifier(LIMITS, batching_policy("continuous"), Admission(2), cost)
        self.recorder = Recorder(self.verifier, classes={"coding": CODING}, **given)
        self.run: Run | None = None

    def say(self, now: float, event: InEvent) -> None:
        actions = self.verifier.handle(now, event)
        self.recorder(now, event, actions)
        self.run = next((a for a in actions if isinstance(a, Run)), self.run)

    def open(self, now: float, connection: int, session: str, **fields: Any) -> None:
        given: dict[str, Any] = {"prompt": [1] * 10, "sampling": Sampling(), "max_tokens": 6} | fields
        self.say(now, Received(connection, "ann", Open(session, 0, **given)))

    def step(self, now: float, until: float, accepted: int | None = None) -> None:
        """One step, from `now` on; it accepts all, or so many."""
        self.say(now, Tick())
        assert self.run is not None
        results = []
        for s in self.run.slices:
            draft = s.tokens[len(s.tokens) - s.n_draft :]
            n = s.n_draft if accepted is None else accepted
            results.append(SliceResult(s.session, n, [*draft[:n], 7]))
        self.run = None
        self.say(until, StepDone(results, (until - now) * 1e3))

    def row(self, now: float) -> dict[str, Any]:
        """The last row but for empty ones."""
        series = self.recorder.snapshot(now)["series"]
        i = max(i for i, n in enumerate(series["steps_per_s"]) if n)
        return {name: series[name][i] for name in COLUMNS}


def test_a_second_is_told_by_what_it_committed_and_what_its_steps_took() -> None:
    world = World()
    world.open(0.0, 1, "session-1", slo=CODING)
    world.step(0.1, 0.15)
    world.say(0.2, Received(1, "ann", Draft("session-1", 1, 1, [3, 4])))
    world.step(0.3, 0.35, accepted=1)
    row = world.row(1.5)
    assert (row["t"], row["tokens_per_s"], row["goodput"]) == (1.0, 3.0, 3.0)
    assert (row["steps_per_s"], row["step_ms"], row["busy"]) == (2.0, 50.0, 0.1)
    assert row["estimate_ms"] == pytest.approx((20.0 + 13.0) / 2, rel=0.2)
    assert (row["prefill_rows"], row["verify_rows"], row["decode_rows"]) == (10.0, 3.0, 0.0)
    # The first token was due 950 ms after the Open, the next one 96 ms after the first
    assert (row["slack_p10_ms"], row["slack_p50_ms"]) == (pytest.approx(-54.0), pytest.approx(850.0))
    assert row["interference_p95_ms"] > 0.0
    assert (row["admitted"], row["refused"]) == (1.0, 0.0)


def test_rows_of_idle_seconds_say_how_things_were_and_not_how_they_are_once_something_happens() -> None:
    world = World()
    world.open(0.0, 1, "session-1", max_tokens=1)
    world.step(0.1, 0.2)
    for i in (2, 3):
        world.open(6.5, 1, f"session-{i}")  # nobody has looked since
    series = world.recorder.snapshot(7.5)["series"]
    assert series["t"] == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    assert [r + w for r, w in zip(series["running"], series["waiting"], strict=True)] == [0] * 6 + [2]


def test_sessions_without_slots_and_with_lost_edges_say_what_they_wait_for() -> None:
    world = World()
    world.open(0.0, 1, "session-1")
    world.open(0.1, 2, "session-2")
    world.say(0.2, Tick())
    shot = world.recorder.snapshot(0.3)
    assert [s["waits_for"] for s in shot["sessions"]] == ["engine", "slot"]
    world.say(0.4, EdgeLost(2))
    assert [s["waits_for"] for s in world.recorder.snapshot(0.5)["sessions"]] == ["engine", "edge_gone"]
    world.step(0.5, 0.6)
    assert world.recorder.snapshot(0.7)["sessions"][0]["waits_for"] == "edge"


def test_a_device_is_told_by_what_it_says_of_itself_and_by_what_came_of_its_drafts() -> None:
    world = World()
    world.open(0.0, 5, "session-1", slo=CODING, device=Device(20.0, 35.0))
    world.step(0.1, 0.2)
    world.say(0.3, Received(5, "ann", Draft("session-1", 1, 1, [3, 4, 5, 6])))
    world.step(0.3, 0.4)
    (device,) = world.recorder.snapshot(0.5)["devices"]
    assert (device["id"], device["key"], device["slo"]) == (5, "ann", "coding")
    assert (device["draft_per_s"], device["rtt_ms"]) == (50.0, 35.0)
    assert (device["drafted"], device["accepted"], device["tokens"]) == (4, 4, 6)
    assert (device["ended"], device["met"], device["sessions"]) == (1, 1, 0)
    assert device["speed"] == pytest.approx(5 / 0.2)
    world.say(0.6, EdgeLost(5))
    assert world.recorder.snapshot(0.7)["devices"] == []


def test_a_session_that_was_late_has_missed_its_slo() -> None:
    world = World()
    world.open(0.0, 1, "session-1", slo=CODING, max_tokens=1)
    world.step(0.1, 1.2)
    world.open(1.3, 1, "session-2", slo=CODING, max_tokens=1)
    world.step(1.4, 1.5)
    world.open(1.6, 1, "session-3", max_tokens=1)
    world.step(1.7, 1.8)
    (of,) = world.recorder.snapshot(9.0)["classes"]
    assert (of["name"], of["ended"], of["met"]) == ("coding", 2, 1)
    series = world.recorder.snapshot(9.0)["series"]
    assert (sum(series["met"]), sum(series["missed"])) == (1.0, 1.0)
    assert sum(series["goodput"]) == 2.0, "the late token is none, the one without an SLO is"


def test_a_refused_session_is_counted_and_forgotten() -> None:
    world = World()
    for i in range(3):
        world.open(0.0, 1, f"session-{i}")
    world.recorder.refused()  # as for a key's limits, before the verifier hears of it
    series = world.recorder.snapshot(2.0)["series"]
    assert (series["admitted"][0], series["refused"][0]) == (2.0, 2.0)


def test_slos_that_requests_make_up_take_no_more_than_their_share() -> None:
    world = World()
    for i in range(MOST_TARGETS + 5):
        for slo in (Slo(10.0 + i, 5.0), CODING):
            world.open(float(i), 1, f"session-{i}", slo=slo)
            world.say(float(i), Received(1, "ann", Cancel(f"session-{i}")))
    classes = {c["name"]: c for c in world.recorder.snapshot(99.0)["classes"]}
    assert len(world.recorder.snapshot(99.0)["classes"]) == MOST_TARGETS + 1
    assert classes["coding"]["ended"] == MOST_TARGETS + 5
    assert classes["others"]["ended"] == 6


def test_a_cancelled_session_is_over() -> None:
    world = World()
    world.open(0.0, 1, "session-1", slo=CODING)
    world.say(0.1, Received(1, "ann", Cancel("session-1")))
    shot = world.recorder.snapshot(0.2)
    assert (shot["n_sessions"], shot["devices"][0]["sessions"]) == (0, 0)


def test_clients_without_an_edge_are_one_row_that_stays() -> None:
    world = World(device=lambda connection: THIN)
    for i in (1, 2):
        world.open(0.0, i, f"session-{i}")
    world.say(0.1, EdgeLost(1))
    (row,) = world.recorder.snapshot(0.2)["devices"]
    assert (row["thin"], row["key"]) == (True, "")


def test_rows_go_on_while_nothing_happens_and_only_new_ones_are_asked_for() -> None:
    world = World(epoch=1000.0)
    world.open(0.0, 1, "session-1")
    shot = world.recorder.snapshot(3.5)
    assert shot["series"]["t"] == [1001.0, 1002.0, 1003.0]
    assert (shot["now"], shot["clock"]) == (1003.5, "unix")
    assert world.recorder.snapshot(5.0, since=1003.0)["series"]["t"] == [1004.0, 1005.0]


def test_old_rows_are_dropped() -> None:
    series = Series(kept=3)
    for t in range(5):
        series.add(float(t), Second(), {"price": 0.0, "kv": 0.0, "running": 0, "waiting": 0})
    assert series.since(-1.0)["t"] == [2.0, 3.0, 4.0]


def test_several_verifiers_are_one_fleet() -> None:
    def rows(tokens: float, steps: float, ms: float | None, slack: float | None, t: float) -> dict[str, Any]:
        row = dict.fromkeys(COLUMNS, 0.0) | {"t": t, "tokens_per_s": tokens, "steps_per_s": steps}
        row |= {"step_ms": ms, "slack_p10_ms": slack, "kv": tokens / 100}  # type: ignore[dict-item]
        return {name: [value] for name, value in row.items()}

    one = summed([rows(10.0, 1.0, 40.0, 5.0, 7.01), rows(30.0, 3.0, 20.0, -5.0, 6.98)], 1.0)
    assert (one["tokens_per_s"], one["step_ms"], one["slack_p10_ms"]) == ([40.0], [25.0], [-5.0])
    assert one["kv"] == [0.2]
    alone = summed([rows(10.0, 0.0, None, None, 7.0)], 1.0)
    assert (alone["step_ms"], alone["slack_p10_ms"]) == ([None], [None])
    assert summed([], 1.0)["t"] == []
