"""`wisp check-faults` finds nothing where there is nothing, finds what is planted, and every run can be run again."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

import planted
from wisp.check import faults
from wisp.check.faults.check import Report, check, source_hash
from wisp.check.faults.engine import HashTarget, Text
from wisp.check.faults.loop import Restless, VirtualLoop
from wisp.check.faults.nodes import RouterProcess
from wisp.check.faults.plan import FAULTS, Event, Plan, plan_of, with_events
from wisp.check.faults.shrink import Case, alike, read_case, shrink, write_case
from wisp.check.faults.world import Found, Outcome, World, run_plan
from wisp.cli import app
from wisp.core.errors import ConfigError
from wisp.core.protocol.sampling import Sampling
from wisp.core.protocol.step import Slice

HERE = Path(__file__).parent
CASES = sorted((HERE / "faults").glob("*.json"))
# Situations that the check is for: without one of them it shows less than it claims.
PROMISED = (
    "KV taken for others",
    "connection lost in a step",
    "draft verified",
    "edge knows more",
    "prefix copied",
    "prefix reused",
    "prompt in pieces",
    "refused: conflict",
    "refused: engine_error",
    "refused: forbidden",
    "refused: logits_not_finite",
    "refused: malformed",
    "refused: model_changed",
    "refused: out_of_turn",
    "refused: out_of_vocabulary",
    "refused: overloaded",
    "refused: oversized",
    "refused: rate_limit_exceeded",
    "refused: stale_epoch",
    "refused: unknown_base",
    "refused: unknown_session",
    "session from elsewhere",
    "session resumed",
    "session resumed in a step",
    "slice failed",
    "step failed",
    "step of many",
    "token not known yet",
)


# --- nothing to find


def test_a_few_runs_find_nothing_and_bring_about_all_that_was_promised() -> None:
    report = check(0, 13, minutes=0, jobs=1)
    assert report.passed, report.violations
    assert report.seeds == 13
    assert report.faults > 900
    assert not [name for name in PROMISED if not report.by_situation.get(name)]
    assert set(report.by_kind) == set(FAULTS)
    assert report.tokens > 3000


@pytest.mark.extended
def test_many_runs_find_nothing() -> None:
    report = check(1000, 300, minutes=0, jobs=2)
    assert report.passed, report.violations
    assert report.by_situation["edge knows more in a step"] > 0
    assert report.by_situation["steps lost with another"] > 0


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_earlier_failures_stay_mended(path: Path) -> None:
    assert run_plan(read_case(path)).found is None


# --- the same again


def test_a_run_is_a_function_of_its_seed() -> None:
    plan = plan_of(5)
    first = run_plan(plan)
    assert run_plan(msgspec.json.decode(msgspec.json.encode(plan), type=Plan)) == first
    assert run_plan(plan_of(6)).trace != first.trace


def test_a_run_is_the_same_in_another_process() -> None:
    script = "from wisp.check.faults.world import run_plan; from wisp.check.faults.plan import plan_of\n"
    script += "print(run_plan(plan_of(3)).trace)"
    environment = {**os.environ, "PYTHONHASHSEED": "99"}
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment
    )
    assert ended.stdout.strip() == run_plan(plan_of(3)).trace


def test_parts_of_a_long_check_add_up(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    check(20, 1, minutes=0, jobs=1, resume=path)
    parts = check(20, 3, minutes=0, jobs=1, resume=path)
    whole = check(20, 3, minutes=0, jobs=1)
    whole.cpu_s = parts.cpu_s
    assert parts == whole
    assert msgspec.json.decode(path.read_bytes(), type=Report) == parts
    assert check(20, 3, minutes=0, jobs=1, resume=path) == parts


@pytest.mark.parametrize(
    ("report", "why"),
    [
        (Report(20, source="of another day"), "is of other code"),
        (Report(21, source=source_hash()), "begins with seed 21"),
        ("{}", "as a report of"),
    ],
)
def test_a_report_of_other_runs_is_not_gone_on_with(report: object, why: str, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_bytes(msgspec.json.encode(report))
    with pytest.raises(ConfigError, match=why):
        check(20, 3, minutes=0, jobs=1, resume=path)


# --- something to find


def detect(name: str, seeds: int) -> dict[str, object]:
    """Run the check on a planted defect, in a process of its own."""
    ended = subprocess.run(
        [sys.executable, str(HERE / "planted.py"), name, str(seeds)],
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, object] = json.loads(ended.stdout.splitlines()[-1])
    return found


def test_a_planted_defect_is_found() -> None:
    assert detect("lost_place_is_not_reported", 10)["seeds"]


@pytest.mark.extended
@pytest.mark.parametrize("name", planted.DEFECTS)
def test_every_planted_defect_is_found(name: str) -> None:
    found = detect(name, planted.MOST_SEEDS)
    assert found["seeds"], found


def test_defects_are_planted_in_every_part_and_each_has_its_place() -> None:
    for name, defect in planted.DEFECTS.items():
        assert inspect.getsource(importlib.import_module(defect.module)).count(defect.right) == 1, name
    parts = Counter(defect.part for defect in planted.DEFECTS.values())
    assert all(parts[part] >= 2 for part in ("verifier", "session", "KV", "drafter", "edge", "router"))


# --- a shorter plan


def test_a_plan_is_made_as_short_as_it_fails() -> None:
    """It fails while the third and the tenth event are in it."""
    plan = plan_of(1)
    needed = {plan.events[3], plan.events[10]}

    def run(tried: Plan) -> Found | None:
        return Found("token 5 is wrong", 30.0) if needed <= set(tried.events) else None

    assert set(shrink(plan, Found("token 7 is wrong", 30.0), run).events) == needed


def test_names_and_numbers_do_not_tell_violations_apart() -> None:
    assert alike("session 00ff00ff00ff00ff has 5 at 7", "session 11aa11aa11aa11aa has 6 at -7")
    assert not alike("session 00ff00ff00ff00ff has 5 at 7", "slots hold other than 5 tokens")


def test_a_file_is_the_plan_again_and_one_that_is_none_is_refused(tmp_path: Path) -> None:
    plan = with_events(plan_of(4), [Event(1.0, "kill", 3, 4, 0.5)])
    write_case(tmp_path / "case.json", plan, Found("something", 1.0))
    assert read_case(tmp_path / "case.json") == plan
    (tmp_path / "none.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"none\.json"):
        read_case(tmp_path / "none.json")


def test_the_command_replays_a_file(tmp_path: Path) -> None:
    plan = with_events(plan_of(2), plan_of(2).events[:10])
    (tmp_path / "case.json").write_bytes(msgspec.json.encode(Case(plan)))
    ended = CliRunner().invoke(app, ["check-faults", "--replay", str(tmp_path / "case.json"), "--json"])
    assert ended.exit_code == 0
    outcome = json.loads(ended.stdout)
    assert outcome["found"] is None
    assert outcome["seed"] == 2


def test_a_file_that_is_no_plan_of_the_seed_that_failed_is_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one that is stays as it is: it took long to make it short."""
    found, runs = Found("token 5 is wrong", 30.0), list[Plan]()
    plan = with_events(plan_of(3), plan_of(3).events[:5])

    def run(tried: Plan) -> Outcome:
        runs.append(tried)
        return Outcome(tried.seed, {}, {}, {}, 0, 0, 0, 0.0, "", found)

    monkeypatch.setattr(faults, "check", lambda *_, **__: Report(3, seeds=1, violations={3: found.what}))
    monkeypatch.setattr(faults, "run_plan", run)
    monkeypatch.setattr(faults, "shrink", lambda *_: plan)
    out, report = tmp_path / "case.json", tmp_path / "report.json"
    for there in ("not json", msgspec.json.encode(Case(plan_of(4), "")).decode()):
        out.write_text(there)
        args = {"first": 3, "seeds": 1, "minutes": 0, "jobs": 1, "resume": report, "out": out}
        assert faults.run_check(**args, as_json=True) == 1  # type: ignore[arg-type]
        assert read_case(out) == plan
    before, runs[:] = out.stat().st_mtime_ns, []
    assert faults.run_check(**args, as_json=True) == 1  # type: ignore[arg-type]
    assert runs == [plan]
    assert out.stat().st_mtime_ns == before


# --- the parts


def test_a_server_reads_the_file_of_keys_as_it_is_when_it_reads_it() -> None:
    """Limits change shortly before all heals, and a server takes up to two seconds to read them."""
    world = World(with_events(plan_of(5475), [Event(24.9, "limit", 0, 2)]))
    assert world.run().found is None
    [router] = world.alive(RouterProcess)
    assert router.keys.limits == world.shape.limits


def test_a_process_that_is_frozen_does_later_what_was_due_and_one_that_is_dead_never() -> None:
    loop = VirtualLoop(pytest.fail)
    steps: list[tuple[str, float]] = []

    async def walk(name: str) -> None:
        for _ in range(3):
            await asyncio.sleep(1.0)
            steps.append((name, loop.now))

    lives = {name: loop.born(name, offset) for name, offset in (("a", 0.0), ("b", 1e6), ("c", 3.0))}
    for name, life in lives.items():
        loop.spawn(life, walk(name))
    world = loop.born("world")
    loop.run_in(world, loop.freeze, lives["b"], after_s=0.5)
    loop.run_in(world, loop.die, lives["c"], after_s=1.5)
    loop.run_in(world, loop.thaw, lives["b"], after_s=2.5)
    assert not loop.run(lambda: False)
    loop.close()
    assert steps == [("a", 1.0), ("c", 1.0), ("a", 2.0), ("b", 2.5), ("a", 3.0), ("b", 3.5), ("b", 4.5)]


def test_a_process_has_a_clock_of_its_own() -> None:
    loop = VirtualLoop(pytest.fail)
    seen: list[float] = []
    life = loop.born("late", 100.0)
    loop.run_in(life, lambda: seen.append(loop.time()), after_s=2.0)
    loop.run(lambda: False)
    loop.close()
    assert seen == [102.0]


def test_a_process_that_does_not_come_to_rest_is_found() -> None:
    loop = VirtualLoop(lambda what: None)
    life = loop.born("busy")

    def again() -> None:
        loop.run_in(life, again)

    again()
    with pytest.raises(Restless, match="busy does not come to rest"):
        loop.run(lambda: False)


def test_a_wait_below_the_clocks_resolution_ends() -> None:
    loop = VirtualLoop(pytest.fail)
    ended: list[float] = []

    async def wait() -> None:
        until = loop.time() + 2e-16
        while (left := until - loop.time()) > 0.0:
            await asyncio.sleep(left)
        ended.append(loop.now)

    loop.spawn(loop.born("soon"), wait())
    loop.run(lambda: False)
    loop.close()
    assert ended == [pytest.approx(1e-9)]


def test_the_target_says_what_its_slot_holds_and_not_what_it_is_told() -> None:
    prompt, sampling = [1, 2, 3], Sampling(seed=9)
    text = Text(0, prompt, sampling, 8, ignore_eos=True).upto(8)
    engine = HashTarget(0, 2, 64, 128, 64)
    [first] = engine.run([Slice(1, 0, 0, prompt, sampling=sampling)])
    assert first.tokens == text[:1]
    [right] = engine.run([Slice(1, 0, 3, text[:4], n_draft=3, position=1, sampling=sampling)])
    assert (right.accepted, right.tokens) == (3, text[1:5])
    [wrong] = engine.run([Slice(1, 0, 2, text[4:5], position=5, sampling=sampling)])
    assert wrong.tokens != text[5:6]
    other = Text(1, prompt, sampling, 8, ignore_eos=True).upto(8)
    assert other != text
