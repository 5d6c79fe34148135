"""Two steps of vLLM in flight: whatever comes between, each session gets the target's own text.

On vLLM's CPU build, with a device that comes as late as it may and host memory that is poisoned (`late_device`), and as
it is served there.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from slices import PROMPT, SAMPLING, check_slices_after_a_failed_slice_fail_alone, first, follower
from vllm_rig import BLOCK_BYTES, GREEDY, Device, engine_of, prompts, reference, steps_of, with_vllm
from wisp.core.errors import EngineError, StepLostError
from wisp.core.protocol.messages import Cancel, Draft, Open, Verdict
from wisp.core.protocol.sampling import Sampling
from wisp.core.protocol.step import ENGINE_ERROR, NOT_FINITE, Copy, Slice, SliceResult
from wisp.core.verify.admission import Admission
from wisp.core.verify.batching import batching_policy
from wisp.core.verify.events import Limits, Received, Run, Send, Tick
from wisp.core.verify.verifier import Verifier
from wisp.engines.in_order import GONE

pytestmark = with_vllm

SAMPLINGS = [
    GREEDY,
    Sampling(1.0, seed=5),
    Sampling(0.7, 0, 0.9, 0.0, 3),
    Sampling(1.2, 40),
    Sampling(1.0, seed=7, min_tokens=8, ends=(10, 46)),
]
FAILURE = "a failure made for testing"


class Session(Device):
    """A device whose steps may be in flight. `void`: what is in flight is of no use any more."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.flight: deque[Slice] = deque()
        self.void = False

    def plan(self, number: int) -> Slice | None:
        """Its slice in the next step, which comes after `number`; None if that is not known before others are back."""
        if not self.flight:
            return self.next()
        last = self.flight[-1]
        if self.void or last.n_draft:
            return None
        start = last.start + len(last.tokens)
        if last.sample:
            position = last.position + 1
            if position >= self.n:
                return None
            return Slice(self.slot, self.slot, start, [0], 0, True, position, self.sampling, after=number)
        held, self.held = self.held, start
        work, self.held = self.next(), held
        return work

    def cancel(self) -> None:
        """Whatever is in flight, it is asked again from the beginning."""
        self.forget()
        self.void = bool(self.flight)


class Fleet:
    """Sessions on all slots, at most two steps in flight, and trouble. `fail`: makes the next step fail."""

    def __init__(
        self,
        engine: Any,
        seed: int,
        *,
        depth: int = 2,
        sessions: int = 24,
        fail: Callable[[], None] | None = None,
        trouble: float = 0.03,
    ) -> None:
        self.rng = random.Random(seed)
        self.engine, self.queue = engine, engine.queue(depth)
        self.depth, self.trouble, self.fail = depth, trouble, fail
        self.spoiled: set[int] = set()  # slots of the next step in which the model computes nonsense
        self.left = [
            (prompt, i) for _ in range(sessions // 8) for i, prompt in enumerate(prompts(8, self.rng))
        ]
        self.sessions = [self._session(slot) for slot in range(engine.info.slots)]
        self.ended: list[Session] = []
        self.flying: deque[tuple[Run, list[Session]]] = deque()
        self.step = self.epoch = 0
        self.counts: Counter[str] = Counter()

    def run(self) -> None:
        """Until all sessions have ended."""
        while self.sessions or self.flying:
            full = len(self.flying) >= self.depth
            if full or (self.flying and self.rng.random() < 0.3) or not self._submit():
                self._collect()
        self.counts["tokens"] = sum(len(s.prompt) + len(s.said) for s in self.ended)

    def check(self) -> None:
        """They were told what the engine says to each of them alone, one token a step, one step at a time."""
        for session in self.ended:
            self.engine.clear()
            start, feed, said = 0, session.prompt, list[int]()
            for position in range(session.n):
                work = Slice(1, 0, start, feed, 0, True, position, session.sampling)
                [result] = self.engine.run([work])
                said += result.tokens
                start, feed = start + len(feed), result.tokens
            assert session.said[: session.n] == said

    def _session(self, slot: int) -> Session:
        prompt, i = self.left.pop()
        return Session(slot, prompt, SAMPLINGS[i % len(SAMPLINGS)], self.rng.choice((3, 12, 40)), self.rng)

    def _submit(self) -> bool:
        planned = [(s, s.plan(self.step)) for s in self.sessions]
        able = [(s, work) for s, work in planned if work is not None]
        if not able:
            return False
        some = self.rng.sample(able, self.rng.randint(1, len(able)))
        self.step += 1
        copies, slices = [], []
        for session, work in some:
            copy = self._copy(session, work)
            if copy is not None:
                copies.append(copy)
                work = session.next()
            slices.append(work)
        for (session, _), work in zip(some, slices, strict=True):
            session.flight.append(work)
        if self.fail is not None and self.rng.random() < self.trouble:
            self.counts["failed steps"] += 1
            self.fail()
        if self.rng.random() < self.trouble:
            self.spoiled.add(self.rng.choice(slices).slot)
        run = Run(copies, slices, self.step, self.epoch)
        self.counts["decoded ahead"] += sum(work.after >= 0 for work in slices)
        self.counts["steps ahead"] += bool(self.flying)
        self.queue.submit(run)
        self.spoiled.clear()
        self.flying.append((run, [session for session, _ in some]))
        return True

    def _copy(self, session: Session, work: Slice) -> Copy | None:
        """Of what another session holds, and of what this one begins with, sometimes."""
        if work.start or session.flight or self.rng.random() < 0.5:
            return None
        chain = session.prompt + session.said
        for other in self.sessions:
            theirs, n = other.prompt + other.said, 0
            while n < min(len(chain) - 1, other.held) and chain[n] == theirs[n]:
                n += 1
            if other is not session and n > 4 and not other.void:
                self.counts["copies"] += 1
                session.held = n
                return Copy(other.slot, session.slot, n)
        return None

    def _collect(self) -> None:
        run, sessions = self.flying.popleft()
        try:
            done = self.queue.collect()
        except EngineError as error:
            self._failed(run, error)
            for session in sessions:
                session.flight.popleft()
                session.void = bool(session.flight)
            return
        assert done.step == run.step
        assert run.epoch == self.epoch
        for session, work, result in zip(sessions, run.slices, done.results, strict=True):
            session.flight.popleft()
            self._back(session, work, result)

    def _failed(self, run: Run, error: EngineError) -> None:
        if isinstance(error, StepLostError):
            self.counts["lost steps"] += 1
            assert run.epoch < self.epoch
            return
        assert FAILURE in str(error)
        self.epoch = run.epoch + 1
        for session in self.sessions:
            session.cancel()

    def _back(self, session: Session, work: Slice, result: SliceResult) -> None:
        self.counts["drafts accepted"] += result.accepted
        if session.void:
            self.counts["dropped"] += 1
        elif result.error:
            assert (result.code, result.error) == (ENGINE_ERROR, GONE) or result.code == NOT_FINITE
            self.counts["failed slices"] += 1
            session.cancel()
        else:
            session.take(work, result)
        if session.done:
            session.void = True
        elif self.rng.random() < self.trouble:
            self.counts["cancels"] += bool(session.flight)
            session.cancel()
        if session.void and not session.flight:
            session.void = False
            if session.done:
                self._end(session)

    def _end(self, session: Session) -> None:
        self.ended.append(session)
        self.sessions.remove(session)
        if self.left:
            self.sessions.append(self._session(session.slot))


@pytest.fixture
def engine(engine_of_vllm: Any) -> Any:
    """Eight slots of 256 tokens, all empty."""
    return engine_of_vllm


def failing(engine: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Calling it makes the next step fail in the workers."""
    executor, fails = engine.started.core.model_executor, [False]
    execute = executor.execute_model

    def execute_model(*args: Any, **kwargs: Any) -> Any:
        if fails.pop():
            fails.append(False)
            raise RuntimeError(FAILURE)
        fails.append(False)
        return execute(*args, **kwargs)

    def fail() -> None:
        fails[-1] = True

    monkeypatch.setattr(executor, "execute_model", execute_model)
    return fail


def late(engine: Any, seed: int, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Counter[str]:
    """A fleet on a device that comes late, and what happened."""
    from late_device import late_device

    fail_launch, rows = failing(engine, monkeypatch), engine.started.scheduler.rows

    def inside() -> Fleet:
        with late_device(engine) as device:

            def fail() -> None:
                if fleet.rng.random() < 0.5:
                    device.fail_next = FAILURE
                else:
                    fail_launch()

            fleet = Fleet(engine, seed, fail=fail, **settings)
            device.spoils = fleet.spoiled.__contains__
            fleet.run()
            fleet.counts["late"] = device.late
            return fleet

    fleet: Fleet = engine.inside(inside)
    fleet.counts["rows"] = engine.started.scheduler.rows - rows
    fleet.check()
    return fleet.counts


def test_no_text_depends_on_what_the_device_has_still_to_do(
    engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No answer is there before it is waited for, and host memory that may be used again is poisoned."""
    counts = Counter[str]()
    for seed in range(4):
        counts += late(engine, seed, monkeypatch)
    assert counts["late"] > 250
    assert counts["decoded ahead"] > 150
    for trouble in ("copies", "failed steps", "lost steps", "failed slices", "dropped", "drafts accepted"):
        assert counts[trouble], trouble


def test_nor_where_slices_come_in_chunks(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.started, "step_tokens", 16)
    counts = late(engine, 7, monkeypatch)
    assert counts["late"] > 60


def test_nor_where_blocks_are_taken_from_steps_in_flight(
    hf_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks for three contexts of the eight: what a step in flight reads and writes goes to others after it."""
    with engine_of(hf_folder, kv_bytes=20 * BLOCK_BYTES) as small:
        counts = late(small, 8, monkeypatch, trouble=0.01)
        assert counts["late"] > 60
        assert counts["rows"] > 1.4 * counts["tokens"]  # lost and computed again


@pytest.mark.parametrize("depth", [1, 2])
def test_on_a_cpu_steps_are_prepared_beside_the_model(
    engine: Any, depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = Fleet(engine, 9, depth=depth, fail=failing(engine, monkeypatch))
    fleet.run()
    fleet.check()
    assert (fleet.counts["decoded ahead"] > 30) == (depth == 2)
    assert fleet.counts["failed steps"]


@pytest.mark.extended
def test_each_of_two_workers_keeps_what_was_chosen(hf_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    with engine_of(hf_folder, tensor_parallel=2) as split:
        queue, said = split.queue(2), list[int]()
        queue.submit(Run([], [first()], 1))
        for step in range(2, 10):
            queue.submit(Run([], [follower(step - 1, step - 1)], step))
            said += queue.collect().results[0].tokens
        assert said == reference(PROMPT, SAMPLING, 8)
        queue.collect()


def test_a_token_that_came_back_in_time_is_taken_from_the_host(engine: Any) -> None:
    queue, said = engine.queue(2), reference(PROMPT, SAMPLING, 3)
    queue.submit(Run([], [first()], 1))
    assert queue.collect().results[0].tokens == said[:1]
    queue.submit(Run([], [follower(1, 1)], 2))  # planned before that
    queue.submit(Run([], [follower(2, 2)], 3))
    assert [queue.collect().results[0].tokens for _ in range(2)] == [said[1:2], said[2:3]]
    assert engine.held(0) == len(PROMPT) + 2


def test_what_is_not_decided_is_not_built_on(engine: Any) -> None:
    """Neither by another slot, nor by a slice that cannot know how far its slot gets."""
    queue, said = engine.queue(2), reference(PROMPT, SAMPLING, 3)
    queue.submit(Run([], [first(tokens=[*PROMPT, 7, 8])], 1))
    queue.collect()
    drafted = Slice(0, 0, len(PROMPT), [7, 8], 1, True, 1, SAMPLING)
    queue.submit(Run([], [drafted], 2))
    assert engine.held(0) == len(PROMPT) + 1
    queue.submit(Run([Copy(0, 1, len(PROMPT) + 2)], [], 3))
    queue.collect()
    with pytest.raises(EngineError, match="slot 0 holds 6 tokens, not 7"):
        queue.collect()
    queue.submit(Run([], [first()], 4, epoch=1))
    queue.submit(Run([], [follower(3, 1)], 5, epoch=1))  # not the step that chose for this slot
    assert queue.collect().results[0].tokens == said[:1]
    assert queue.collect().results[0].error == GONE


def test_slices_after_a_failed_slice_fail_alone(engine: Any) -> None:
    check_slices_after_a_failed_slice_fail_alone(engine.queue(2))


def test_a_token_enters_the_prefix_cache_once_it_is_decided(engine: Any) -> None:
    """Not as what is there in its place before: blocks are found by their tokens."""
    queue = engine.queue(2)
    prompt = [i % 256 for i in range(31)]  # with the first of its answer a block is full
    said = reference(prompt, GREEDY, 4)
    queue.submit(Run([], [Slice(1, 0, 0, prompt)], 1))
    for step in (2, 3, 4):
        queue.submit(Run([], [Slice(1, 0, 29 + step, [0], 0, True, step - 1, after=step - 1)], step))
        assert queue.collect().results[0].tokens == said[step - 2 : step - 1]
    queue.collect()
    assert engine.held(0) == 34
    with steps_of(engine) as steps:
        queue.submit(Run([Copy(0, 1, 34), Copy(0, 2, 31)], [Slice(2, 1, 34, said[3:], 0, True, 4)], 5))
        assert queue.collect().results[0].tokens == reference(prompt, GREEDY, 5)[4:]
        queue.submit(Run([], [Slice(3, 2, 31, [0, 5])], 6))
        assert queue.collect().results[0].tokens == reference([*prompt, 0, 5], GREEDY, 1)
    assert [list(step.values()) for step in steps] == [[3], [33]]


def test_a_slot_whose_blocks_are_gone_is_computed_again_up_to_a_token_in_flight(hf_folder: Path) -> None:
    rng = random.Random(4)
    long = [[rng.randrange(256) for _ in range(200)] for slot in range(3)]
    with engine_of(hf_folder, kv_bytes=20 * BLOCK_BYTES) as small:  # for two of them

        def inside() -> None:
            queue = small.queue(2)
            prompts = [Slice(slot, slot, 0, long[slot], sampling=SAMPLING) for slot in range(3)]
            queue.submit(Run([], prompts, 1))
            said = []
            for step in range(2, 9):
                follows = Slice(0, 0, 198 + step, [0], 0, True, step - 1, SAMPLING, after=step - 1)
                with steps_of(small) as steps:
                    queue.submit(Run([], [follows], step))
                assert (steps[0]["0"] > 1) == (step == 2)
                said += queue.collect().results[0].tokens
            assert said == reference(long[0], SAMPLING, 7)

        small.inside(inside)


def test_what_builds_on_a_slice_that_fails_on_the_device_fails_too(engine: Any) -> None:
    from late_device import late_device

    spoiled: set[int] = set()
    said = reference(PROMPT, SAMPLING, 2)

    def inside() -> None:
        with late_device(engine) as device:
            device.spoils = spoiled.__contains__
            queue = engine.queue(2)
            spoiled.add(0)
            queue.submit(Run([], [first(0), first(1)], 1))
            spoiled.clear()
            queue.submit(Run([], [follower(1, 1, 0), follower(1, 1, 1)], 2))
            assert [r.code for r in queue.collect().results if r.error] == [NOT_FINITE]
            gone, fine = queue.collect().results
            assert (gone.error, fine.tokens) == (GONE, said[1:])
            spoiled.add(0)
            queue.submit(Run([], [first(0)], 3))
            spoiled.clear()
            queue.submit(Run([], [first(0)], 4))  # begun anew, which builds on nothing
            queue.submit(Run([], [follower(4, 1, 0)], 5))
            assert queue.collect().results[0].code == NOT_FINITE
            assert [queue.collect().results[0].tokens for _ in range(2)] == [said[:1], said[1:]]

    engine.inside(inside)


class House:
    """A real `Verifier` with two steps in flight, on a clock of its own; edges that draft, ask for tokens, or leave."""

    def __init__(self, engine: Any, seed: int) -> None:
        info, self.rng = engine.info, random.Random(seed)
        limits = Limits(
            info.n_vocab, info.eos, info.slots, info.slot_tokens, info.kv_tokens, info.step_tokens, depth=2
        )
        self.verifier = Verifier(limits, batching_policy("continuous"), Admission(100))
        self.queue, self.counts = engine.queue(2), Counter[str]()
        self.now, self.flying = 0.0, 0
        self.prompts = {f"session-{i}": prompt for i, prompt in enumerate(prompts(20, self.rng))}
        self.said: dict[str, list[int]] = {}
        self.waiting = list(self.prompts)
        self.going: set[str] = set()

    def run(self) -> None:
        while self.waiting or self.going:
            while self.waiting and len(self.going) < 10:
                self._open(self.waiting.pop())
            for _ in range(self.rng.randint(0, 3)):
                self._feed(Tick())
            if self.flying:
                self.flying -= 1
                self._feed(msgspec.structs.replace(self.queue.collect(), engine_ms=8.0, host_ms=3.0))
            if self.going and self.rng.random() < 0.03:
                self._cancel(self.rng.choice(sorted(self.going)))

    def _open(self, name: str) -> None:
        self.going.add(name)
        self.said[name] = []
        serve = self.rng.random() < 0.7
        sampling = SAMPLINGS[len(self.prompts[name]) % len(SAMPLINGS)]
        self._say(Open(name, 1, self.prompts[name], sampling, 40, serve=serve, ignore_eos=True))

    def _cancel(self, name: str) -> None:
        self.counts["cancels"] += 1
        self._say(Cancel(name))
        self.going.discard(name)
        if self.rng.random() < 0.5:  # and asked again
            again = f"{name}x"
            self.prompts[again] = self.prompts[name]
            self.waiting.append(again)
        del self.said[name]

    def _say(self, message: Any) -> None:
        self._feed(Received(1, "key", message))

    def _feed(self, event: Any) -> None:
        self.now += self.rng.uniform(0.0, 0.008)
        for action in self.verifier.handle(self.now, event):
            if isinstance(action, Run):
                self.queue.submit(action)
                self.flying += 1
                self.counts["decoded ahead"] += sum(s.after >= 0 for s in action.slices)
            elif isinstance(action, Send):
                assert isinstance(action.message, Verdict), action.message
                self._hear(action.message)

    def _hear(self, verdict: Verdict) -> None:
        name = verdict.session
        if name not in self.said:
            return
        said = self.said[name]
        said[verdict.base :] = verdict.tokens
        if len(said) >= 40:
            self.going.discard(name)
        elif self.rng.random() < 0.3:
            ahead = self._reference(name)[len(said) :][: self.rng.randint(1, 4)]
            self._say(Draft(name, verdict.round + 1, len(said), ahead))

    def _reference(self, name: str) -> list[int]:
        prompt = self.prompts[name]
        return reference(prompt, SAMPLINGS[len(prompt) % len(SAMPLINGS)], 48)

    def check(self) -> None:
        assert all(said == self._reference(name)[:40] for name, said in self.said.items())


@pytest.mark.parametrize("seed", range(2))
def test_a_verifier_with_two_steps_in_flight_tells_the_targets_text(engine: Any, seed: int) -> None:
    from late_device import late_device

    def inside() -> House:
        with late_device(engine):
            house = House(engine, seed)
            house.run()
            return house

    house = engine.inside(inside)
    house.check()
    assert house.counts["cancels"]
    assert house.counts["decoded ahead"] > 20
