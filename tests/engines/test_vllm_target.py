"""What the vLLM engine makes of slices, step by step. What all engines do: test_target_engines.py."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from slices import PROMPT, SAMPLING, verify
from vllm_rig import EOS, engine_of, reference, steps_of, with_vllm
from wisp.core.errors import ConfigError, EngineError
from wisp.core.protocol.sampling import Sampling
from wisp.core.protocol.step import Copy, Slice
from wisp.engines.vllm import selftest

pytestmark = with_vllm


@pytest.fixture
def engine(engine_of_vllm: Any) -> Any:
    """Eight slots of 256 tokens, all empty."""
    return engine_of_vllm


@pytest.fixture(scope="module")
def answer() -> list[int]:
    return reference(PROMPT, SAMPLING, 24)


def test_info_describes_the_model(engine: Any) -> None:
    info = engine.info
    assert (info.engine, info.model, info.mode) == ("vllm", "tiny", "fast")
    assert 0 < info.flip_gap < 0.1
    assert (info.slots, info.slot_tokens, info.kv_tokens) == (8, 256, 2048)
    assert (info.n_vocab, info.eos) == (512, frozenset({EOS}))


def test_a_verification_is_one_step_of_vllm_however_many_take_part(engine: Any, answer: list[int]) -> None:
    with steps_of(engine) as steps:
        results = engine.run([verify(slot, answer[:slot]) for slot in range(8)])
    assert [r.accepted for r in results] == list(range(8))
    assert [list(step.values()) for step in steps] == [[5, 6, 7, 8, 9, 10, 11, 12]]


def test_held_slots_are_not_stepped_and_the_order_is_the_batchs(engine: Any, answer: list[int]) -> None:
    engine.run([verify(slot, answer[:3]) for slot in range(8)])
    with steps_of(engine) as steps:
        for order in ([5, 2, 7], [0], [7, 6, 5, 4, 3, 2, 1, 0]):
            work = [Slice(1, slot, 8, answer[3:5], 1, position=4, sampling=SAMPLING) for slot in order]
            results = engine.run(work)
            assert [r.tokens for r in results] == [answer[4:6]] * len(order)
    assert [[name.split(".")[0] for name in step] for step in steps] == [
        ["5", "2", "7"],
        ["0"],
        ["7", "6", "5", "4", "3", "2", "1", "0"],
    ]


def test_while_all_are_held_nothing_uses_the_cpu(engine: Any, answer: list[int]) -> None:
    engine.run([verify(slot, answer[:3]) for slot in range(8)])
    time.sleep(0.5)  # whatever spins for a while after work has stopped by now
    before = time.process_time()
    time.sleep(1.0)
    assert time.process_time() - before < 0.1


def test_a_slice_wider_than_a_step_becomes_several(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    long = [i % 256 for i in range(150)]
    said = reference(long, Sampling(), 6)
    monkeypatch.setattr(engine.started, "step_tokens", 32)
    with steps_of(engine) as steps:
        results = engine.run([Slice(1, 0, 0, long + said[:5], 5), Slice(2, 1, 0, PROMPT, sampling=SAMPLING)])
    assert results[0].tokens == said[:6]
    assert results[1].tokens == reference(PROMPT, SAMPLING, 24)[:1]
    assert all(sum(step.values()) <= 32 for step in steps)


def test_a_prefix_is_copied_and_the_source_goes_its_own_way(engine: Any) -> None:
    long = [i % 256 for i in range(70)]
    said = reference(long, Sampling(), 12)
    engine.run([Slice(1, 0, 0, long + said[:6], 6)])
    engine.copy(Copy(0, 1, 72))
    with steps_of(engine) as steps:
        results = engine.run(
            [Slice(1, 0, 0, [1, 2, 3], sample=False), Slice(2, 1, 72, said[2:4], 1, position=3)]
        )
    assert results[1].tokens == said[3:5]
    assert list(steps[0].values()) == [3, 10]  # 64 of 72 tokens came from the prefix cache
    assert [engine.held(slot) for slot in range(2)] == [3, 74]


def test_prefixes_are_not_shared_unless_copied(engine: Any) -> None:
    long = [i % 256 for i in range(70)]
    engine.run([Slice(1, 0, 0, long)])
    with steps_of(engine) as steps:
        engine.run([Slice(2, 1, 0, long)])
        engine.run([Slice(1, 2, 0, long)])  # the same session, evicted and back
    assert [list(step.values()) for step in steps] == [[70], [6]]


def test_a_follow_up_in_the_same_slot_reuses_what_it_can(engine: Any) -> None:
    long = [i % 256 for i in range(70)]
    said = reference(long, Sampling(), 30)
    engine.run([Slice(1, 0, 0, long + said, len(said))])
    turned = [*said[:20], 7, 8, 9]
    [result] = engine.run([Slice(2, 0, 90, [7, 8, 9])])
    assert result.tokens == reference(long + turned, Sampling(), 1)
    [result] = engine.run([Slice(3, 0, 40, [1, 2, 3])])  # back into blocks that are shared by hash
    assert result.tokens == reference([*long[:40], 1, 2, 3], Sampling(), 1)
    [result] = engine.run([Slice(1, 1, 0, long)])  # and the shared ones were not written into
    assert result.tokens == said[:1]


def test_a_step_that_fails_empties_everything_and_the_next_is_right(
    engine: Any, answer: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    long = [i % 256 for i in range(70)]
    executor = engine.started.core.model_executor
    engine.run([Slice(1, 0, 0, PROMPT, sample=False)])

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("a failure made for testing")

    monkeypatch.setattr(executor, "execute_model", broken)
    with pytest.raises(EngineError, match="made for testing"):
        engine.run([Slice(2, 1, 0, long)])
    monkeypatch.undo()
    assert engine.held(0) == 0
    assert "holds 0 tokens" in engine.run([Slice(1, 0, 5, [1])])[0].error
    with steps_of(engine) as steps:  # nothing that was never computed is taken from the prefix cache
        [result] = engine.run([Slice(2, 1, 0, long)])
    assert list(steps[0].values()) == [70]
    assert result.tokens == reference(long, Sampling(), 1)


class Broken:
    """An engine whose drafts do harm, in a way that `harm` says."""

    def __init__(self, engine: Any, harm: Any) -> None:
        self.engine, self.harm, self.info, self.clear = engine, harm, engine.info, engine.clear

    def observe(self, batch: list[Slice]) -> Any:
        found = self.engine.observe(batch)
        return [self.harm(result, rows) if work.n_draft else (result, rows)
                for work, (result, rows) in zip(batch, found, strict=True)]  # fmt: skip


@pytest.mark.parametrize(
    "harm",
    [
        lambda result, rows: (msgspec.structs.replace(result, tokens=[7] * len(result.tokens)), rows),
        lambda result, rows: (result, rows[::-1].copy()),
        lambda result, rows: (msgspec.structs.replace(result, error="for testing"), rows),
    ],
    ids=["other tokens", "other logits", "an error"],
)
def test_the_self_test_notices_what_drafts_may_not_do(engine: Any, harm: Any) -> None:
    assert 0 < selftest.check(engine) < 0.1
    with pytest.raises(ConfigError, match="self-test of --engine vllm failed"):
        selftest.check(Broken(engine, harm))


@pytest.mark.parametrize(("slots", "slot_tokens"), [(0, 100), (1, 31)])
def test_an_engine_without_room_is_refused(slots: int, slot_tokens: int, tmp_path: Path) -> None:
    with (
        pytest.raises(EngineError, match="at least one"),
        engine_of(tmp_path, slots=slots, slot_tokens=slot_tokens),
    ):
        pass


def test_attention_that_wants_another_order_gets_it_and_results_keep_theirs(
    engine: Any, answer: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = engine.started.core.model_executor.driver_worker.worker
    long = [i % 256 for i in range(40)]
    engine.run([verify(slot, answer[:2]) for slot in range(4)])
    monkeypatch.setattr(worker.model_runner, "reorder_batch_threshold", 2, raising=False)  # V1's
    with steps_of(engine) as steps:
        results = engine.run(
            [
                Slice(9, 5, 0, long),
                Slice(1, 0, 7, answer[2:5], 2, position=3, sampling=SAMPLING),
                Slice(1, 1, 7, answer[2:3], 0, position=3, sampling=SAMPLING),
                Slice(8, 6, 0, long, sample=False),
                Slice(1, 2, 7, answer[2:4], 1, position=3, sampling=SAMPLING),
            ]
        )
    assert [list(step.values()) for step in steps] == [[40, 3, 1, 40, 2]]
    assert worker.wisp_hooks.batch.slots.tolist() == [1, 2, 0, 5, 6]
    assert [r.tokens for r in results] == [
        reference(long, Sampling(), 1),
        answer[3:6],
        answer[3:4],
        [],
        answer[3:5],
    ]


def test_sessions_that_alternate_leave_each_others_blocks_alone(engine: Any, answer: list[int]) -> None:
    said: dict[int, list[int]] = {}
    for slot, result in enumerate(engine.run([verify(slot, []) for slot in range(8)])):
        said[slot] = list(result.tokens)
    for step in range(12):
        half = [slot for slot in range(8) if slot % 2 == step % 2]
        work = []
        for slot in half:
            n = len(said[slot])
            work.append(
                Slice(1, slot, len(PROMPT) + n - 1, said[slot][-1:] + answer[n : n + 2], 2, True, n, SAMPLING)
            )
        for slot, result in zip(half, engine.run(work), strict=True):
            said[slot] += result.tokens
    assert all(said[slot] == answer[: len(said[slot])] for slot in range(8))
    assert all(len(said[slot]) == 1 + 6 * 3 for slot in range(8))


@pytest.mark.parametrize(
    ("option", "settings"),
    [("--kv-type", {"kv_type": "q8_0"}), ("--quantization", {"quantization": "magic"})],
)
def test_a_type_that_vllm_does_not_have_is_refused_with_those_it_has(
    option: str, settings: dict[str, str]
) -> None:
    from wisp.engines.vllm.starting import Wanted, settings_for

    with pytest.raises(ConfigError, match=rf"{option} .*vLLM has no such; choose one of: .*fp8"):
        settings_for(Wanted(model="m", **settings))  # type: ignore[arg-type]
