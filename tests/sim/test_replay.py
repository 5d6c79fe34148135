"""Replays: the trace's own tokens whatever the policy, and times that can be computed by hand."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import wisp.sim.replay
from wisp.calibrate.traces.format import OffPath, Trace, TraceSet
from wisp.core.draft.drafter import Drafter
from wisp.core.draft.policies import POLICIES, Ahead, Policies
from wisp.core.errors import ConfigError
from wisp.core.protocol.sampling import Sampling
from wisp.engines.build import read_predictor
from wisp.sim.devices import DEVICES, Device, Link, Server, device
from wisp.sim.replay import Bench, Tally, replay
from wisp.sim.replay_grid import FIXED, summary

TRACES = Path(__file__).parents[2] / "data" / "traces" / "qwen2.5-coder"
COLUMNS = ("confidence", "entropy", "margin", "spread", "lead")
SURE, UNSURE = (0.95, 0.2, 0.9, 3.0, 6.0), (0.3, 2.5, 0.05, 2.0, 0.4)
SERVER = Server("server", 30.0, 1.0, prefill_ms=100.0)
BENCH = Bench(Device("device", 100.0), Link(20.0), SERVER)


def made(target: list[int], draft: list[int], finish: str = "length", depth: int = 6) -> Trace:
    """A trace whose drafter is sure where it is right, and goes on with 900, 901, … where it is not."""
    right = np.equal(target, draft)
    off = {
        int(i): OffPath(np.arange(900, 900 + depth, dtype=np.int32), np.array([UNSURE] * depth, np.float32))
        for i in np.flatnonzero(~right)
    }
    return Trace(
        "made", "made", "train", "greedy", Sampling(), finish, np.array([7], np.int32),
        np.array(target, np.int32), np.array(draft, np.int32),
        np.array([SURE if r else UNSURE for r in right], np.float32), off, COLUMNS,
    )  # fmt: skip


def long_trace(seed: int = 1, n: int = 80, acceptance: float = 0.75, finish: str = "length") -> Trace:
    source = random.Random(seed)
    target = [source.randrange(100) for _ in range(n - 1)] + [500]
    draft = [t if source.random() < acceptance else 800 for t in target]
    return made(target, draft, finish)


@pytest.fixture
def drafters(monkeypatch: pytest.MonkeyPatch) -> list[Drafter]:
    """Every drafter that a replay makes, in order."""
    found: list[Drafter] = []

    class Kept(Drafter):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            found.append(self)

    monkeypatch.setattr(wisp.sim.replay, "Drafter", Kept)
    return found


def policies(spec: str, *, server_mode: bool = False) -> Policies:
    return Policies(spec, read_predictor(), server_mode=server_mode)


# --- tokens


@pytest.mark.parametrize("spec", [*POLICIES, "fixed:1", "fixed:12", "confidence:0.9", "gain:2"])
@pytest.mark.parametrize("ahead", [None, Ahead(), Ahead(0.0)], ids=["alone", "ahead", "eager"])
@pytest.mark.parametrize("server_mode", [False, True])
@pytest.mark.parametrize("speed", [6.0, 100.0])
def test_any_policy_commits_the_traces_own_tokens(
    drafters: list[Drafter], spec: str, ahead: Ahead | None, server_mode: bool, speed: float
) -> None:
    traces = [
        long_trace(1),
        long_trace(2, finish="stop"),
        long_trace(3, acceptance=0.0),
        long_trace(4, acceptance=1.0, finish="stop"),
        made([5], [5]),
        made([5], [6], "stop", depth=0),
    ]
    bench = Bench(Device("d", speed), Link(60.0, 10.0, 0.02), Server("s", 20.0, 0.4, 5.0))
    tally = replay(traces, bench, policies(spec, server_mode=server_mode), ahead)
    assert [d.committed for d in drafters] == [t.target.tolist() for t in traces]
    assert tally.tokens == sum(map(len, traces))
    assert tally.accepted <= tally.draft_tokens


@pytest.mark.parametrize("spec", ["fixed:4", "predictor", "gain"])
def test_a_shipped_trace_comes_out_as_it_is(drafters: list[Drafter], spec: str) -> None:
    traces = TraceSet.load(TRACES / "python.t0.7.npz").traces[:8]
    replay(traces, BENCH, policies(spec, server_mode=True), Ahead())
    assert [d.committed for d in drafters] == [t.target.tolist() for t in traces]


def test_server_mode_takes_over_from_a_slow_device_and_is_faster() -> None:
    traces = [long_trace(i, n=200) for i in range(3)]
    bench = Bench(Device("slow", 6.0), Link(60.0), SERVER)
    alone, served = (replay(traces, bench, policies("gain", server_mode=mode)) for mode in (False, True))
    assert served.verifications < 0.5 * alone.verifications
    assert served.tokens_per_s > 1.3 * alone.tokens_per_s


def test_drafting_ahead_hides_drafting_behind_a_long_round_trip() -> None:
    traces = [long_trace(i, n=200, acceptance=0.95) for i in range(3)]
    bench = Bench(Device("d", 30.0), Link(150.0), SERVER)
    alone, ahead = (replay(traces, bench, policies("gain"), a) for a in (None, Ahead()))
    assert alone.ahead_wasted_ms == 0.0
    assert ahead.ahead_wasted_ms > 0.0
    assert ahead.tokens_per_s > 1.08 * alone.tokens_per_s


# --- time


def test_the_time_of_a_short_text_by_hand() -> None:
    tally = replay([made([1, 2, 3, 4], [1, 2, 9, 4])], BENCH, policies("fixed:2"))
    # Prompt: 10 there, 100 to read it, 31 for a step, 10 back: the clock starts at 151 with token 1.
    # Drafts 2 9 until 171; 10 there, 33 for two drafts and one more, 10 back: 2 3 at 224.
    # The last is the target's own: 10, 31, 10: 4 at 275.
    assert tally.time_ms == pytest.approx(124.0)
    assert tally.timed_tokens == 3
    assert tally.tokens_per_s == pytest.approx(3 / 0.124)
    assert (tally.tokens, tally.verifications, tally.draft_tokens, tally.accepted) == (4, 2, 2, 1)
    assert tally.drafting_ms == pytest.approx(20.0)
    assert [(r.base, r.drafted, r.accepted, round(r.at_ms)) for r in tally.rounds] == [
        (0, 0, 0, 151), (1, 2, 1, 224), (3, 0, 0, 275),
    ]  # fmt: skip


def test_wasted_is_what_was_drafted_beyond_the_first_rejected() -> None:
    none = replay([made([1, 2, 3, 4], [1, 2, 9, 4])], BENCH, policies("fixed:2"))
    assert none.wasted_ms == 0.0  # a rejected token has to be drafted to be found out
    one = replay([made([1, 2, 3, 4], [1, 9, 3, 4])], BENCH, policies("fixed:2"))
    assert one.wasted_ms == pytest.approx(10.0)
    text = [1, 2, 3, 4, 5, 6, 7]
    four = replay([made(text, [1, 9, 3, 4, 5, 6, 7])], BENCH, policies("fixed:5"))
    assert four.wasted_ms == pytest.approx(40.0)
    assert four.report()["wasted_ms_per_token"] == round(40.0 / 7, 3)


def test_a_drafter_that_is_always_right_saves_round_trips() -> None:
    text = list(range(1, 22))  # one with the prompt, then five and one more a round
    tally = replay([made(text, text)], BENCH, policies("fixed:4"))
    assert tally.verifications == 4
    assert tally.time_ms == pytest.approx(4 * (40.0 + 20.0 + 35.0))
    assert tally.report()["acceptance"] == 1.0


def test_a_drafter_whose_continuation_ends_sends_what_it_has() -> None:
    tally = replay([made([1, 2, 3, 4, 5], [1, 9, 3, 4, 5], depth=1)], BENCH, policies("fixed:3"))
    assert [r.drafted for r in tally.rounds] == [0, 2, 2]


@pytest.mark.parametrize(
    "bench",
    [
        Bench(BENCH.device, Link(20.0, jitter_ms=15.0), SERVER),
        Bench(BENCH.device, Link(20.0, loss=0.2), SERVER),
        Bench(Device("hot", 100.0, throttle=0.5, throttle_after_s=0.2), Link(20.0), SERVER),
        Bench(BENCH.device, Link(20.0), Server("queue", 30.0, 1.0, queue_ms=20.0)),
    ],
    ids=["jitter", "loss", "throttle", "queue"],
)
def test_trouble_costs_time_and_never_tokens(drafters: list[Drafter], bench: Bench) -> None:
    traces = [long_trace(1), long_trace(2)]
    calm, troubled = (replay(traces, b, policies("fixed:4")) for b in (BENCH, bench))
    assert troubled.time_ms > calm.time_ms + 50.0
    assert [d.committed for d in drafters] == [t.target.tolist() for t in traces] * 2
    assert (troubled.accepted, troubled.verifications) == (calm.accepted, calm.verifications)


def test_a_seed_decides_everything() -> None:
    traces = [long_trace(1), long_trace(2)]

    def run(seed: int) -> Tally:
        bench = Bench(BENCH.device, Link(20.0, 15.0, 0.1), Server("s", 30.0, 1.0, 20.0), seed=seed)
        return replay(traces, bench, policies("gain", server_mode=True), Ahead())

    assert run(1) == run(1)
    assert run(1).time_ms != run(2).time_ms


def test_a_price_keeps_drafts_from_being_sent() -> None:
    traces = [long_trace(i) for i in range(3)]
    free, dear = (
        replay(traces, Bench(BENCH.device, BENCH.link, SERVER, price), policies("gain"))
        for price in (0.0, 0.9)
    )
    assert dear.draft_tokens < 0.5 * free.draft_tokens


def test_a_report_of_nothing_is_all_zeros() -> None:
    assert set(Tally().report().values()) == {0.0}


# --- devices


def test_a_throttled_device_slows_down_once_it_is_hot() -> None:
    hot = device("pi5+throttle")
    assert hot.draft_ms(59.0) == DEVICES["pi5"].draft_ms()
    assert hot.draft_ms(61.0) == pytest.approx(2 * DEVICES["pi5"].draft_ms())


def test_a_device_by_its_speed_or_refused_with_the_names_there_are() -> None:
    assert device("25").draft_ms() == 40.0
    with pytest.raises(ConfigError, match="pi5"):
        device("abacus")


def test_a_link_without_jitter_takes_half_the_round_trip() -> None:
    assert Link(30.0).one_way_ms(random.Random(0)) == 15.0
    source = random.Random(0)
    delays = [Link(30.0, jitter_ms=8.0).one_way_ms(source) for _ in range(4000)]
    assert min(delays) >= 15.0
    assert sum(delays) / len(delays) == pytest.approx(19.0, abs=0.3)  # half of the jitter each way
    lost = [Link(30.0, loss=0.25).one_way_ms(source) for _ in range(4000)]
    assert set(lost) == {15.0, 215.0}
    assert lost.count(215.0) == pytest.approx(1000, abs=120)


# --- the grid's summary


def cell(rtt: float, gain: float, ahead: float, served: float) -> dict[str, Any]:
    """fixed:4 makes 10 tokens per second, the other fixed lengths and the predictor 8."""
    speeds = dict.fromkeys(FIXED, 8.0) | {"fixed:4": 10.0, "predictor": 8.0, "gain": gain}
    speeds |= {"gain+ahead": ahead, "gain+ahead+server": served}
    wasted = {"gain": 1.0, "fixed:5": 4.0, "predictor": 2.0}
    of = {
        name: {"tokens_per_s": s, "wasted_ms_per_token": wasted.get(name, 0.0)} for name, s in speeds.items()
    }
    return {"rtt_ms": rtt, "policies": of}


def test_the_summary_of_made_up_cells() -> None:
    result = summary(
        [cell(5.0, 12.0, 12.0, 18.0), cell(150.0, 9.0, 13.5, 13.5), cell(150.0, 10.0, 11.0, 9.9)]
    )
    assert result["cells"] == 3
    assert result["gain_at_least_best_fixed"] == pytest.approx(2 / 3, abs=1e-4)
    assert result["gain_over_best_fixed_min"] == pytest.approx(0.9)
    assert result["gain_over_best_fixed_mean"] == pytest.approx(31 / 30, abs=1e-4)
    assert result["gain_over_predictor_min"] == pytest.approx(1.125)
    assert result["gain_over_predictor_mean"] == pytest.approx(31 / 24, abs=1e-4)
    assert result["wasted_gain_over_fixed5"] == pytest.approx(0.25)
    assert result["wasted_predictor_over_fixed5"] == pytest.approx(0.5)
    assert result["ahead_min"] == 1.0
    assert result["ahead_mean_by_rtt"] == {"5": 1.0, "150": 1.3}
    assert result["server_mode_min"] == 0.9
    assert result["server_mode_mean"] == pytest.approx(3.4 / 3, abs=1e-4)
