"""Steps in flight: what is planned while a step runs, what is dropped, and that no text depends on it."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rig import SAMPLING, Rig
from toy import toy_text
from wisp.core.protocol.constraints import Constraints
from wisp.core.protocol.messages import Cancel, Draft, Open, Refused, Verdict
from wisp.core.protocol.sampling import Sampling
from wisp.core.protocol.slo import Slo
from wisp.core.verify.events import Run, StepDone, Tick, WakeAt
from wisp.core.verify.kv import packed
from wisp.core.verify.states import State

PROMPT = [1, 2, 3]
TEXT = toy_text(PROMPT, SAMPLING, 30)
SLOS = (None, Slo(3000.0, 1000.0), Slo(200.0, 20.0))
CONSTRAINED = Sampling(seed=3, constraints=Constraints(((11, 30.0),)))


def serving(session: str = "session-1", max_tokens: int = 30, **changes: object) -> Open:
    opened = Open(session, 0, PROMPT, SAMPLING, max_tokens, serve=True)
    return msgspec.structs.replace(opened, **changes)


def warm(depth: int = 2, **options: object) -> Rig:
    """A rig that knows its host's time, from a session that is over."""
    rig = Rig(depth=depth, **options)  # type: ignore[arg-type]
    rig.receive(serving("warm-up-1", 1), 9, "warm")
    rig.settle()
    rig.sent.clear()
    rig.runs.clear()
    return rig


def ends_at(position: int) -> Sampling:
    """With an end of the text at that position."""
    stop = toy_text(PROMPT, SAMPLING, position + 1)[-1]
    constraints = Constraints(stop_token_ids=(stop,))
    sampling = msgspec.structs.replace(SAMPLING, constraints=constraints)
    assert not constraints.choosing
    assert len(toy_text(PROMPT, sampling, 30)) == position + 1
    return sampling


def check_books(rig: Rig) -> None:
    """Slots hold what their sessions have cached, and no more in all than there is."""
    kv = rig.verifier.kv
    assert 0 <= kv.held == sum(len(slot.tokens) for slot in kv.slots) <= kv.kv_tokens
    for s in rig.verifier.sessions.values():
        assert (kv.slots[s.slot].tokens if s.slot is not None else packed(())) == s.progress.chain[: s.cached]


def test_a_decode_is_planned_before_the_token_that_it_feeds_is_known() -> None:
    rig = warm()
    rig.receive(serving())
    rig.dispatch()
    first, second = (run.slices[0] for run in rig.runs)
    assert (first.tokens, first.start, first.position, first.after) == (PROMPT, 0, 0, -1)
    assert (second.tokens, second.start, second.position, second.after) == ([0], 3, 1, rig.runs[0].step)
    rig.settle()
    assert rig.text() == TEXT
    assert sum(s.after >= 0 for run in rig.runs for s in run.slices) == 29  # all but the prompt's


def test_the_last_token_allowed_has_no_follower() -> None:
    rig = warm()
    rig.receive(serving(max_tokens=2))
    rig.settle()
    assert rig.text() == TEXT[:2]
    assert len(rig.runs) == 2


def test_chunks_of_a_prompt_follow_each_other() -> None:
    prompt = list(range(40))
    rig = warm(step_tokens=16)
    rig.receive(serving(prompt=prompt, max_tokens=3))
    rig.dispatch()
    assert [(s.start, len(s.tokens), s.sample, s.after) for run in rig.runs for s in run.slices] == [
        (0, 16, False, -1),
        (16, 16, False, -1),
    ]
    rig.settle()
    assert rig.text() == toy_text(prompt, SAMPLING, 3)


def test_a_follower_of_the_end_is_dropped_and_keeps_its_slot_until_it_is_back() -> None:
    rig = warm(slots=1)
    rig.receive(serving(sampling=ends_at(1)))
    rig.dispatch()
    rig.finish()
    rig.dispatch()
    assert len(rig.flying) == 2
    rig.finish()
    assert [v.finish for v in rig.verdicts()] == ["", "stop"]
    assert not rig.verifier.knows("session-1")  # its id and its place are free
    rig.receive(serving("session-2"), 2)
    rig.feed(Tick())
    assert len(rig.flying) == 1  # no slot for it
    rig.finish()
    assert rig.verifier.kv.owned_slots == 0
    rig.settle()
    assert rig.text(2) == TEXT
    assert len(rig.verdicts()) == 2


def test_a_draft_that_arrives_is_verified_instead_of_another_follower() -> None:
    rig = warm()
    rig.receive(serving())
    rig.dispatch()
    rig.finish()
    rig.receive(Draft("session-1", 1, 1, [0] * 2, serve=False))
    rig.feed(Tick())
    assert len(rig.flying) == 1  # its own follower was planned before; no other one is
    rig.settle()
    assert rig.text()[:2] == TEXT[:2]
    assert rig.verdicts()[-1].round == 1


def test_a_constrained_session_takes_part_when_its_token_is_known() -> None:
    rig = warm()
    rig.receive(serving(sampling=CONSTRAINED, max_tokens=5))
    rig.settle()
    assert rig.text() == toy_text(PROMPT, CONSTRAINED, 5)
    assert all(s.after < 0 for run in rig.runs for s in run.slices)


def test_where_most_could_go_on_only_with_the_results_of_a_step_its_end_is_waited_for() -> None:
    rig = warm(slots=8, step_tokens=64)
    rig.host_ms = rig.verifier.in_flight._host_s = 1e-3
    for i in range(6):
        sampling = CONSTRAINED if i else SAMPLING
        rig.receive(serving(f"session-{i}", 6, sampling=sampling), i + 1)
    rig.settle()
    assert all(len(run.slices) == 6 for run in rig.runs)  # nobody is left behind
    assert rig.text(1) == TEXT[:6]


def test_cancelling_with_two_steps_in_flight() -> None:
    rig = warm(slots=1)
    rig.receive(serving())
    rig.dispatch()
    rig.receive(Cancel("session-1"))
    assert len(rig.flying) == 2
    assert rig.verifier.kv.owned_slots == 1
    rig.finish()
    assert rig.verifier.kv.owned_slots == 1
    rig.finish()
    assert rig.verifier.kv.owned_slots == 0
    assert rig.silent
    assert not rig.verifier.sessions


def test_an_edge_that_knows_more_than_what_is_in_flight() -> None:
    rig = warm()
    rig.receive(serving())
    rig.dispatch()
    assert len(rig.flying) == 2
    rig.receive(serving(epoch=1, committed=TEXT[:7]), 2)
    rig.settle()
    assert TEXT[:7] + rig.text(2) == TEXT


@pytest.mark.parametrize("resumed", [False, True])
def test_a_lost_edge_with_two_steps_in_flight(resumed: bool) -> None:
    rig = warm()
    rig.receive(serving())
    rig.dispatch()
    rig.lose()
    if resumed:
        rig.receive(serving(epoch=1), 2)
    rig.finish()
    rig.finish()
    session = next(iter(rig.verifier.sessions.values()))
    if not resumed:
        assert session.state is State.PARKED
        assert session.n_committed == 2
        rig.receive(serving(epoch=1), 2)
    rig.settle()
    assert rig.verdicts(2)[-1].finish
    for verdict in rig.verdicts(2):
        assert verdict.tokens == TEXT[verdict.base :][: len(verdict.tokens)]


def test_after_a_failed_step_those_behind_it_run_again() -> None:
    rig = warm()
    rig.receive(serving(), 1)
    rig.dispatch()
    assert [len(run.slices) for run in rig.flying] == [1, 1]
    rig.receive(serving("session-2"), 2)
    rig.finish()
    rig.dispatch()  # the newcomer takes part in this one, behind one with the first session alone
    assert sorted(s.session for s in rig.flying[1].slices) == [2, 3]
    behind = rig.flying[1].step
    rig.fail("out of memory")
    assert isinstance(rig.sent[1][-1], Refused)
    rig.dispatch()
    assert [(run.step == behind, run.epoch) for run in rig.flying] == [(True, 0), (False, 1)]
    rig.settle()
    assert rig.text(2) == TEXT


def test_a_slice_that_fails_takes_its_followers_with_it_and_nobody_else() -> None:
    rig = warm()
    rig.engine.poison = 46
    rig.receive(serving("session-1", prompt=[44, 46]), 1)
    rig.receive(serving("session-2"), 2)
    rig.dispatch()
    assert [len(run.slices) for run in rig.flying] == [2, 2]
    rig.finish()
    assert rig.refused(1).code == "logits_not_finite"
    rig.settle()
    assert rig.text(2) == TEXT
    assert not rig.sent[1]
    assert rig.verifier.kv.owned_slots == 0


def test_after_a_slice_that_failed_nothing_counts_as_cached_while_its_follower_is_in_flight() -> None:
    rig = warm()
    rig.receive(serving())
    rig.steps(2)
    rig.dispatch()
    assert len(rig.flying) == 2
    rig.engine.poison = TEXT[0]
    rig.finish()
    check_books(rig)
    rig.finish()
    assert rig.verifier.kv.owned_slots == 0


def test_kv_of_steps_in_flight_is_spoken_for() -> None:
    rig = warm(slots=2, slot_tokens=32, kv_tokens=40, step_tokens=64)
    for i in (1, 2):
        rig.receive(serving(f"session-{i}", 28), i, f"key {i}")
    for _ in range(200):
        rig.dispatch()
        if rig.run is None:
            break
        kv = rig.verifier.kv
        assert kv.held + sum(len(s.tokens) for run in rig.flying for s in run.slices) <= kv.kv_tokens
        rig.finish()
    assert rig.text(1) == rig.text(2) == TEXT[:28]


@pytest.mark.parametrize("batching", ["fcfs", "continuous", "wisp"])
def test_a_prefix_is_not_copied_into_kv_that_steps_in_flight_will_need(batching: str) -> None:
    rig = warm(slots=3, slot_tokens=64, kv_tokens=64, step_tokens=64, batching=batching)
    prompts = [5] * 40, [5] * 30 + [8] * 4
    rig.receive(serving(prompt=prompts[0], max_tokens=9), 1)
    rig.steps(2)
    assert len(rig.flying) == 1
    rig.receive(serving("session-2", prompt=prompts[1], max_tokens=9), 2)
    while rig.dispatch():
        check_books(rig)
        rig.finish()
        check_books(rig)
    assert rig.text(1) == toy_text(prompts[0], SAMPLING, 9)
    assert [v.cached for v in rig.verdicts(2)] == [30] * 9
    assert rig.text(2) == toy_text(prompts[1], SAMPLING, 9)


def test_a_step_is_planned_when_the_running_one_has_about_a_host_time_left() -> None:
    """Steps of 40 ms, with 4 ms of the host's time."""
    rig = Rig(depth=2)
    rig.receive(serving())
    now, ends_at, lead_ms, steps = 0.0, 0.0, [], 0
    while steps < 29:
        for action in rig.verifier.handle(now, Tick()):
            if isinstance(action, Run):
                rig.queue.submit(action)
                lead_ms.append((ends_at - now) * 1e3)
                ends_at = max(ends_at, now + 0.004) + 0.04
        wakes = [a.at for a in rig.verifier.handle(now, Tick()) if isinstance(a, WakeAt)]
        if wakes and wakes[0] < ends_at and not rig.verifier.in_flight.full:
            now = wakes[0]
            continue
        now = ends_at if len(rig.verifier.in_flight.steps) == 1 else ends_at - 0.04
        steps += 1
        rig.verifier.handle(now, StepDone(rig.queue.collect().results, 40.0, "", steps - 1, 4.0))
    assert all(4.0 < ms < 12.0 for ms in lead_ms[-10:]), lead_ms


@dataclass
class Plan:
    """A session of the property test, and what was heard of it."""

    open: Open
    expected: list[int]
    text: list[int] = field(default_factory=list)
    connection: int = 0
    over: bool = False


@settings(max_examples=120, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    depth=st.integers(1, 3),
    slots=st.integers(1, 4),
    tight=st.booleans(),
    batching=st.sampled_from(["continuous", "wisp", "fcfs"]),
)
def test_texts_are_the_targets_at_any_depth(
    seed: int, depth: int, slots: int, tight: bool, batching: str
) -> None:
    """Sessions without drafts, that end, leave, come back, fail and are cancelled while steps are in flight."""
    source = random.Random(seed)
    rig = warm(
        depth, slots=slots, slot_tokens=48, kv_tokens=60 if tight else None, step_tokens=12, batching=batching
    )
    plans: list[Plan] = []
    connections = 0
    common = [source.randrange(8) for _ in range(18)]

    def connect(plan: Plan) -> None:
        nonlocal connections
        connections += 1
        if source.random() < 0.3:  # another verifier has served it meanwhile
            known = len(plan.text) + source.randrange(4)
            plan.text = plan.expected[: max(len(plan.text), min(known, len(plan.expected) - 1))]
        plan.connection = connections
        epoch = plan.open.epoch + 1
        plan.open = msgspec.structs.replace(plan.open, epoch=epoch, committed=list(plan.text))
        rig.receive(plan.open, connections)

    def hear() -> None:
        for plan in plans:
            for message in rig.sent.pop(plan.connection, ()):
                if isinstance(message, Refused):
                    assert message.code == "engine_error", message
                    if not plan.over:
                        connect(plan)
                    break
                assert isinstance(message, Verdict)
                assert message.base <= len(plan.text)
                plan.text[message.base :] = message.tokens
                assert plan.text == plan.expected[: len(plan.text)]
                plan.over |= bool(message.finish)

    def act() -> None:
        kind = source.choices(("open", "finish", "hear", "lose", "cancel", "fail"), (2, 8, 4, 1, 0.5, 0.3))[0]
        alive = [plan for plan in plans if not plan.over]
        if kind == "open" and len(plans) < 6:
            prompt = [source.randrange(8) for _ in range(source.choice((2, 3, 20)))]
            if source.random() < 0.5:
                prompt[: len(common)] = common[: len(prompt)]
            stops = tuple(source.sample(range(49), source.choice((0, 8))))
            constraints = Constraints(stop_token_ids=stops)
            if source.random() < 0.3:
                constraints = Constraints(((11, 30.0), (12, 30.0)), 1.0, 0.5, 1.2, stop_token_ids=stops)
            sampling = Sampling(seed=source.randrange(4), constraints=constraints)
            name, most = f"session-{len(plans)}", source.choice((1, 6, 26))
            open_ = Open(name, 0, prompt, sampling, most, slo=source.choice(SLOS), serve=True)
            plans.append(Plan(open_, toy_text(prompt, sampling, most)))
            connect(plans[-1])
        elif kind == "finish" and rig.run is not None:
            rig.finish()
        elif kind == "hear":
            hear()
        elif kind == "lose" and alive:
            plan = source.choice(alive)
            if source.random() < 0.5:
                rig.lose(plan.connection)
            rig.sent.pop(plan.connection, None)
            connect(plan)
        elif kind == "cancel" and alive:
            plan = source.choice(alive)
            rig.receive(Cancel(plan.open.session), plan.connection)
            plan.over = True
        elif kind == "fail" and rig.run is not None:
            rig.fail("a failure")

    for _ in range(120):
        if source.random() < 0.7:
            rig.dispatch()
        in_flight = sum(len(s.tokens) for run in rig.flying for s in run.slices)
        assert rig.verifier.kv.held + in_flight <= rig.verifier.kv.kv_tokens
        check_books(rig)
        rig.now += source.choice((0.0, 0.1))
        act()
    for _ in range(60):
        hear()
        rig.settle()
        rig.now += 1.0  # sessions whose edges are silent make room
        hear()
    for plan in plans:
        assert plan.over, (plan, rig.verifier.sessions)
    rig.settle()
    assert not rig.verifier.sessions
    assert rig.verifier.kv.owned_slots == 0
    assert not rig.flying
