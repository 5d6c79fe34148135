"""Open loops: requests that come by themselves, from a rate or from a file, and what is sent again when refused."""

from __future__ import annotations

import random
from pathlib import Path
from statistics import fmean, stdev

import msgspec
import pytest

from wisp.core.errors import ConfigError
from wisp.core.protocol.messages import Open
from wisp.sim.report import report
from wisp.sim.scenario import Kit, Scenario, load_scenario, recorded_arrivals
from wisp.sim.sim_verifier import SimVerifier
from wisp.sim.simulate import Simulation, gap_s
from wisp.sim.systems import system

POISSON = load_scenario("poisson").brief(10.0, 50.0, 30.0)


def ran(scenario: Scenario, spec: str = "wisp", seed: int = 1) -> Simulation:
    simulation = Simulation(scenario, system(spec), seed)
    simulation.run()
    return simulation


def test_requests_come_at_the_rate_asked_for_whatever_the_answers_take() -> None:
    asked = {}
    for spec in ("wisp", "central"):
        asked[spec] = [(r.arrived, r.seed, len(r.prompt)) for r in ran(POISSON, spec).window()]
    assert 200 - 42 < len(asked["wisp"]) < 200 + 42  # three standard deviations of 50 s at 4 a second
    assert asked["wisp"] == asked["central"]
    gaps = [b - a for (a, *_), (b, *_) in zip(asked["wisp"], asked["wisp"][1:], strict=False)]
    assert (
        0.05 < sum(gap < 0.025 for gap in gaps) / len(gaps) < 0.15
    )  # exponential: 1 - exp(-4 * 0.025) = 0.095


@pytest.mark.parametrize("cv", [0.5, 1.0, 3.0])
def test_arrivals_come_in_bursts_where_asked_for(cv: float) -> None:
    source = random.Random(1)
    gaps = [gap_s(source, 4.0, cv) for _ in range(40_000)]
    assert fmean(gaps) == pytest.approx(0.25, rel=0.05)
    assert stdev(gaps) / fmean(gaps) == pytest.approx(cv, rel=0.05)


def test_a_drafter_beside_the_target_brings_the_user_no_nearer() -> None:
    far = msgspec.structs.replace(
        POISSON.brief(2.0, 6.0, 20.0), arrivals_per_s=1.0, devices=(Kit("100", 400.0),)
    )
    for spec in ("central", "central-speculative"):
        requests = ran(far, spec).window()
        assert requests
        assert min(r.first - r.arrived for r in requests) > 0.4


def test_a_seed_decides_everything() -> None:
    brief = POISSON.brief(3.0, 7.0, 20.0)
    one, two, other = ran(brief), ran(brief), ran(brief, seed=2)
    assert report(one) == report(two)
    assert [r.gaps_ms for r in one.requests] == [r.gaps_ms for r in two.requests]
    assert [r.arrived for r in one.requests] != [r.arrived for r in other.requests]


def test_a_device_that_has_its_answer_takes_the_next_request() -> None:
    simulation = ran(POISSON.brief(5.0, 15.0, 30.0))
    assert len(simulation.devices) < len(simulation.requests)
    at_work: dict[int, float] = {}
    for r in simulation.requests:
        assert at_work.get(r.device, 0.0) <= r.arrived
        at_work[r.device] = r.ended or simulation.env.now


def test_recorded_arrivals_come_as_recorded(tmp_path: Path) -> None:
    lines = ['{"at_s": 3.5, "prompt_tokens": 40}', '{"at_s": 1.25, "prompt_tokens": 70, "rate": 14}']
    path = tmp_path / "arrivals.jsonl"
    path.write_text("\n".join([*lines, ""]))
    scenario = msgspec.structs.replace(POISSON.brief(0.0, 5.0, 60.0), arrivals_per_s=0.0, arrivals=str(path))
    simulation = ran(scenario)
    first, second = simulation.requests
    assert (first.arrived, len(first.prompt), first.slo.tpot_ms) == (1.25, 70, 1e3 / 14)
    assert (second.arrived, len(second.prompt), second.slo.tpot_ms) == (3.5, 40, 1e3 / 8)
    assert report(simulation).met == 2


@pytest.mark.parametrize(
    "line", ["{}", '{"at_s": -1, "prompt_tokens": 5}', '{"at_s": 1, "prompt_tokens": 0}', "\xff", '{"at": 1}']
)
def test_a_file_that_is_none_is_refused(line: str, tmp_path: Path) -> None:
    path = tmp_path / "arrivals.jsonl"
    path.write_text(line, "latin-1")
    with pytest.raises(ConfigError, match=r"arrivals\.jsonl"):
        list(recorded_arrivals(path, POISSON.slo[0]))
    with pytest.raises(ConfigError, match="nowhere"):
        list(recorded_arrivals(Path("nowhere"), POISSON.slo[0]))


def test_the_line_that_is_wrong_is_named_and_windows_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "arrivals.jsonl"
    path.write_text('\ufeff{"at_s": 1, "prompt_tokens": 5}\r\n\r\n{"at_s": 2, "prompt_tokens": 6}\r\n')
    assert [at for at, *_ in recorded_arrivals(path, POISSON.slo[0])] == [1.0, 2.0]
    path.write_text('{"at_s": 1, "prompt_tokens": 5}\n{"at_s": 2}\n')
    with pytest.raises(ConfigError, match=r"line 2: .*prompt_tokens"):
        list(recorded_arrivals(path, POISSON.slo[0]))


def test_the_file_that_ships() -> None:
    scenario = load_scenario("recorded")
    lines = list(recorded_arrivals(Path(scenario.arrivals), scenario.slo[0]))
    assert {slo.rate for *_, slo in lines} == {8.0, 14.0}
    burst = sum(80 <= at < 100 for at, *_ in lines) / 20
    usual = sum(20 <= at < 80 for at, *_ in lines) / 60
    assert burst > 2 * usual
    brief = scenario.brief(5.0, 15.0, 30.0)
    simulation = ran(brief)
    assert report(simulation).arrived == sum(5.0 <= at < 20.0 for at, *_ in lines)


def test_a_refused_request_is_sent_again_and_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    crowd = msgspec.structs.replace(POISSON.brief(5.0, 20.0, 40.0), arrivals_per_s=14.0, retries=2)
    opened: dict[str, int] = {}
    receive = SimVerifier.receive

    def counting(self: SimVerifier, connection: int, message: object) -> None:
        if isinstance(message, Open):
            opened[message.session] = opened.get(message.session, 0) + 1
        receive(self, connection, message)  # type: ignore[arg-type]

    monkeypatch.setattr(SimVerifier, "receive", counting)
    simulation = ran(crowd)
    found = simulation.window()
    assert 0.5 < len(found) / (14.0 * 20.0) < 1.5  # a retry is no arrival
    again = [r for r in found if 0 < r.refusals <= 2 and r.tokens]
    for_good = [r for r in found if r.refused]
    assert again
    assert for_good
    assert all(r.first - r.arrived >= r.refusals for r in again)  # told to wait a second or more, each time
    assert all(r.refusals == 3 and not r.ok and not r.tokens for r in for_good)
    for r in simulation.requests:
        assert opened[f"{r.device}:{r.seed}".rjust(8, ".")] <= 3
    assert sum(opened.values()) >= len(simulation.requests) + sum(r.refusals for r in again)


def test_a_request_that_will_never_do_is_not_sent_again(tmp_path: Path) -> None:
    path = tmp_path / "arrivals.jsonl"
    path.write_text('{"at_s": 1.0, "prompt_tokens": 20000}\n')
    scenario = msgspec.structs.replace(
        POISSON.brief(0.0, 5.0, 30.0), arrivals_per_s=0.0, arrivals=str(path), retries=2
    )
    simulation = ran(scenario)
    (request,) = simulation.requests
    assert (request.refusals, request.refused, request.ok) == (1, True, False)
