"""Many edges on one vLLM engine: whatever they send and whenever, each gets the target's own text."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from vllm_rig import (
    GREEDY,
    Device,
    check_all,
    drive,
    fleet,
    reference,
    steps_of,
    with_vllm,
)
from wisp.check.lossless.constraints import MAKERS, constrain
from wisp.core.protocol.messages import Cancel, Draft, Open, Verdict
from wisp.core.protocol.sampling import Sampling
from wisp.core.verify.admission import Admission
from wisp.core.verify.batching import batching_policy
from wisp.core.verify.events import EdgeLost, Limits, Received, Run, Send, StepDone, Tick
from wisp.core.verify.verifier import Verifier
from wisp.engines.grammars import Grammars
from wisp.engines.llama.tokenizer import LlamaTokenizer

pytestmark = with_vllm


@pytest.fixture
def engine(engine_of_vllm: Any) -> Any:
    return engine_of_vllm


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


@pytest.mark.parametrize("seed", range(2))
def test_eight_edges_with_constraints_get_the_targets_text(
    engine: Any, tokenizer: LlamaTokenizer, seed: int
) -> None:
    """Each constraint once, with drafts that keep to it and drafts that do not."""
    rng = random.Random(seed)
    engine.constraints.grammars = grammars = Grammars(tokenizer)
    names = list(MAKERS)[seed::2]
    devices = fleet(rng, [Sampling(1.0, seed=seed)])
    for device, name in zip(devices, itertools.cycle(names), strict=False):
        script = reference(device.prompt, device.sampling, 40)
        device.sampling = constrain(name, device.sampling, script, rng).ending(engine.info.eos)
        if (constraints := device.sampling.constraints) is not None and constraints.grammar is not None:
            grammars.compile(constraints.grammar)
        reference(device.prompt, device.sampling, device.n + 8, grammars)

    def mishap(device: Device) -> None:
        if rng.random() < 0.05:
            device.forget()

    drive(engine, devices, rng, mishap)
    check_all(devices)


def test_vllm_as_it_comes_says_the_same(engine: Any, hf_folder: Path) -> None:
    rng = random.Random(11)
    devices = fleet(rng, [GREEDY])
    asked = {"prompts": [d.prompt for d in devices], "n": 40}
    script = Path(__file__).with_name("stock_vllm.py")
    stock = subprocess.run(
        [sys.executable, script, hf_folder],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        check=True,
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
        self.feed(Received(1, "key", message))

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
    house.feed(Received(2, "key", opening("session-b", second, serve=True)))
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
