"""Many edges on one vLLM engine: whatever they send and whenever, each gets the target's own text."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from vllm_rig import (
    BLOCK_BYTES,
    Device,
    engine_of,
    folder_of_tiny,
    prompts,
    reference,
    steps_of,
    with_vllm,
)

from wisp.core.admission import Admission
from wisp.core.batching import batching_policy
from wisp.core.events import EdgeLost, FromEdge, Limits, Run, Send, StepDone, Tick
from wisp.core.messages import Cancel, Draft, Open, Verdict
from wisp.core.sampling import Sampling
from wisp.core.verifier import Verifier
from wisp.lab.lossless.cases import TINY
from wisp.lab.lossless.check import Bench, check, chi_square
from wisp.lab.lossless.chi_square import ALARM

pytestmark = with_vllm
GREEDY = Sampling()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of_tiny(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def shared(folder: Path) -> Iterator[Any]:
    with engine_of(folder) as engine:
        yield engine


@pytest.fixture
def engine(shared: Any) -> Any:
    shared.clear()
    return shared


def drive(engine: Any, devices: list[Device], rng: random.Random, mishap: Callable[[Device], None]) -> None:
    """Random ones of them take part in each step, in random order, until all are done."""
    while going := [d for d in devices if not d.done]:
        some = rng.sample(going, rng.randint(1, len(going)))
        work = [d.next() for d in some]
        for device, slice_, result in zip(some, work, engine.run(work), strict=True):
            device.take(slice_, result)
            mishap(device)


def fleet(rng: random.Random, samplings: list[Sampling], n: int = 40) -> list[Device]:
    return [
        Device(slot, prompt, samplings[slot % len(samplings)], n, rng)
        for slot, prompt in enumerate(prompts(8, rng))
    ]


def check_all(devices: list[Device]) -> None:
    for device in devices:
        assert device.said[: device.n] == reference(device.prompt, device.sampling, device.n + 8)[: device.n]


@pytest.mark.parametrize("seed", range(4))
def test_eight_edges_get_the_targets_text_whatever_they_send(engine: Any, seed: int) -> None:
    """Random arrival; right, wrong, garbage, stale and empty drafts; greedy, and sampled in three ways."""
    rng = random.Random(seed)
    devices = fleet(rng, [GREEDY, Sampling(1.0, seed=seed), Sampling(0.7, 0, 0.9, 0.0, 3), Sampling(1.2, 40)])

    def mishap(device: Device) -> None:
        if rng.random() < 0.05:
            device.forget()  # parked, evicted, and back

    drive(engine, devices, rng, mishap)
    check_all(devices)


def test_vllm_as_it_comes_says_the_same(engine: Any, folder: Path) -> None:
    rng = random.Random(11)
    devices = fleet(rng, [GREEDY])
    asked = {"prompts": [d.prompt for d in devices], "n": 40}
    script = Path(__file__).with_name("stock_vllm.py")
    stock = subprocess.run(
        [sys.executable, script, folder], input=json.dumps(asked), capture_output=True, text=True, check=True
    )
    drive(engine, devices, rng, lambda device: None)
    assert [d.said[:40] for d in devices] == json.loads(stock.stdout.splitlines()[-1])


def test_text_does_not_depend_on_drafts_and_does_on_the_seed(engine: Any) -> None:
    texts = []
    for attempt, seed in ((1, 7), (2, 7), (3, 8)):
        rng = random.Random(attempt)
        devices = [Device(0, [5, 6, 7], Sampling(1.0, seed=seed), 40, rng)]
        drive(engine, devices, rng, lambda device: None)
        texts.append(devices[0].said[:40])
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


@pytest.mark.parametrize("seed", range(3))
def test_a_kv_cache_for_a_few_is_enough_for_eight(folder: Path, seed: int) -> None:
    """Blocks for three contexts of the eight: vLLM's cache is taken from one for the other, and no text changes."""
    rng = random.Random(seed)
    with engine_of(folder, kv_bytes=20 * BLOCK_BYTES) as small:
        free = small.started.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
        assert free < 20
        devices = fleet(rng, [GREEDY, Sampling(1.0, seed=seed)], n=60)
        drive(small, devices, rng, lambda device: None)
        fed = small.started.scheduler.rows
    check_all(devices)
    needed = sum(len(d.prompt) + len(d.said) for d in devices)
    assert fed > 1.2 * needed  # blocks were lost and computed again: this did test something


class House:
    """A real `Verifier` over the engine, one thing after another, without sockets."""

    def __init__(self, engine: Any, batching: str = "fcfs") -> None:
        info = engine.info
        limits = Limits(
            info.n_vocab, info.eos, info.slots, info.slot_tokens, info.kv_tokens, info.step_tokens, park_s=5.0
        )
        self.engine = engine
        self.verifier = Verifier(limits, batching_policy(batching), Admission(100))
        self.now = 0.0
        self.sent: list[Verdict] = []
        self.runs: list[Run] = []

    def feed(self, event: Any) -> None:
        self.now += 0.001
        for action in self.verifier.handle(self.now, event):
            if isinstance(action, Send):
                assert isinstance(action.message, Verdict), action.message
                self.sent.append(action.message)
            elif isinstance(action, Run):
                self.runs.append(action)
                for copy in action.copies:
                    self.engine.copy(copy)
                self.feed(StepDone(self.engine.run(action.slices), 1.0))

    def say(self, message: Any) -> None:
        self.feed(FromEdge(1, "key", message))

    def settle(self) -> None:
        for _ in range(50):
            self.feed(Tick())

    def text(self, session: str) -> list[int]:
        said: list[int] = []
        for verdict in self.sent:
            if verdict.session == session:
                said[verdict.base :] = verdict.tokens
        return said


def opening(session: str, prompt: list[int], **more: Any) -> Open:
    return Open(session, 1, prompt, GREEDY, 40, ignore_eos=True, **more)


def test_the_policys_order_is_the_order_of_vllms_step(engine: Any) -> None:
    house = House(engine)
    prompt_of = {f"session-{i}": [i, i + 1, i + 2] for i in range(8)}
    for name, prompt in prompt_of.items():
        house.say(opening(name, prompt))
    house.settle()
    order = [3, 1, 7, 0]
    for i in order:
        name = f"session-{i}"
        ahead = reference(prompt_of[name], GREEDY, 48)[len(house.text(name)) :][:3]
        house.say(Draft(name, 1, len(house.text(name)), ahead))
    with steps_of(engine) as steps:
        house.settle()
    slots = [str(s.slot) for s in house.runs[-1].slices]
    assert [s.session for s in house.runs[-1].slices] == [i + 1 for i in order]
    assert [name.split(".")[0] for name in steps[0]] == slots
    assert len(steps) == 1  # and who had nothing to verify was not stepped


def test_aborts_parking_and_resuming_leave_the_others_alone(engine: Any) -> None:
    house = House(engine, "continuous")
    first, second = [9, 8, 7] * 15, [1, 2, 3]
    house.say(opening("session-a", first, serve=True))
    house.feed(FromEdge(2, "key", opening("session-b", second, serve=True)))
    house.feed(Tick())
    house.say(Cancel("session-a"))  # aborted
    house.feed(EdgeLost(2))  # parked
    house.settle()
    committed = house.text("session-b")
    assert committed != reference(second, GREEDY, 48)[:40]
    house.say(opening("session-c", first, serve=True))
    resumed = msgspec.structs.replace(opening("session-b", second, serve=True), epoch=2, committed=committed)
    house.say(resumed)
    house.settle()
    assert house.text("session-c") == reference(first, GREEDY, 48)[:40]
    assert house.text("session-b") == reference(second, GREEDY, 48)[:40]


def test_check_lossless_finds_nothing(folder: Path) -> None:
    """Reconnects, restarts, evictions, overlapping drafts, failed steps: `wisp check-lossless`, shortened."""
    scale = msgspec.structs.replace(TINY, chats=6, plain=2, samples=0)
    bench = Bench("tiny", "fast", scale, engine="vllm", offline=True)
    try:
        report = check(bench, mode="fast", cases=80, seed=1)
        assert report.passed, report
        assert (report.cases, report.mismatches) == (80, 0)
        assert report.counts["evictions"]
        assert report.counts["overlapping_drafts"]
        found = chi_square(bench, 600, seed=1)
        assert found.p > ALARM, found
    finally:
        bench.close()
