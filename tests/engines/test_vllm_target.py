"""What a slice does to a slot of the vLLM engine, and what happens to slices that cannot be run."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from vllm_rig import EOS, engine_of, folder_of_tiny, reference, steps_of, with_vllm

from wisp.core.errors import ConfigError, EngineError
from wisp.core.sampling import Sampling
from wisp.core.work import Copy, Slice
from wisp.engines.vllm import selftest

pytestmark = with_vllm
PROMPT = [11, 12, 13, 14, 15]
SAMPLING = Sampling(temperature=1.0, seed=4)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with engine_of(folder_of_tiny(tmp_path_factory.mktemp("hf"))) as engine:
        yield engine


@pytest.fixture
def engine(shared: Any) -> Any:
    """Eight slots of 256 tokens, all empty."""
    shared.clear()
    return shared


@pytest.fixture(scope="module")
def answer() -> list[int]:
    return reference(PROMPT, SAMPLING, 24)


def other(token: int) -> int:
    return token - 1 if token else 1


def verify(slot: int, draft: list[int], *, start: int = 0, **more: Any) -> Slice:
    return Slice(1, slot, start, PROMPT[start:] + draft, len(draft), sampling=SAMPLING, **more)


def test_info_describes_the_model(engine: Any) -> None:
    info = engine.info
    assert (info.engine, info.model, info.mode) == ("vllm", "tiny", "fast")
    assert 0 < info.flip_gap < 0.1
    assert (info.slots, info.slot_tokens, info.kv_tokens) == (8, 256, 2048)
    assert (info.n_vocab, info.eos) == (512, frozenset({EOS}))


@pytest.mark.parametrize("sampling", [Sampling(), SAMPLING, Sampling(0.7, 20, 0.9, 0.01, 5)])
def test_without_drafts_it_says_what_the_reference_says(engine: Any, sampling: Sampling) -> None:
    said: list[int] = []
    start, feed = 0, PROMPT
    for position in range(24):
        [result] = engine.run([Slice(1, 0, start, feed, 0, True, position, sampling)])
        said += result.tokens
        start, feed = start + len(feed), result.tokens
    assert said == reference(PROMPT, sampling, 24)


def test_a_right_draft_is_accepted_whole_with_a_bonus(engine: Any, answer: list[int]) -> None:
    [result] = engine.run([verify(0, answer[:9])])
    assert (result.accepted, result.tokens) == (9, answer[:10])
    assert engine.held(0) == len(PROMPT) + 9


def test_the_first_disagreement_is_corrected_and_the_rest_rolled_back(engine: Any, answer: list[int]) -> None:
    [result] = engine.run([verify(0, [*answer[:3], other(answer[3]), *answer[4:9]])])
    assert (result.accepted, result.tokens) == (3, answer[:4])
    assert engine.held(0) == len(PROMPT) + 3
    [result] = engine.run([Slice(1, 0, 8, answer[3:8], 4, position=4, sampling=SAMPLING)])
    assert (result.accepted, result.tokens) == (4, answer[4:9])


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


def test_prefill_says_nothing_and_may_come_in_chunks(engine: Any, answer: list[int]) -> None:
    [result] = engine.run([Slice(9, 0, 0, PROMPT[:2], sample=False)])
    assert (result.session, result.accepted, result.tokens, result.error) == (9, 0, [], "")
    engine.run([Slice(9, 0, 2, PROMPT[2:4], sample=False)])
    assert engine.held(0) == 4
    assert engine.run([verify(0, answer[:2], start=4)])[0].tokens == answer[:3]


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


@pytest.mark.parametrize(
    "copy", [Copy(0, 0, 1), Copy(1, 0, 1), Copy(0, 8, 1), Copy(-1, 0, 0), Copy(0, 1, -1)]
)
def test_impossible_copies_are_refused(engine: Any, copy: Copy) -> None:
    engine.run([Slice(1, 0, 0, PROMPT, sample=False)])
    with pytest.raises(EngineError, match="slot"):
        engine.copy(copy)
    assert engine.held(0) == len(PROMPT)


def test_two_slices_of_one_slot_are_refused(engine: Any) -> None:
    with pytest.raises(EngineError, match="same slot"):
        engine.run([Slice(1, 0, 0, [1]), Slice(2, 0, 0, [1])])


@pytest.mark.parametrize(
    ("work", "complaint"),
    [
        (Slice(1, 0, 0, []), "at least one token"),
        (Slice(1, 0, 6, [1]), "holds 5 tokens"),
        (Slice(1, 0, -1, [1]), "to start from"),
        (Slice(1, 0, 5, [1] * 252), "exceed the slot's 256"),
        (Slice(1, 0, 5, [1, -1]), "vocabulary"),
        (Slice(1, 0, 5, [1, 1 << 40]), "vocabulary"),
        (Slice(1, 0, 5, [1, 2], 2), "draft tokens"),
        (Slice(1, 0, 5, [1, 2], -1), "draft tokens"),
        (Slice(1, 0, 5, [1, 2], 1, sample=False), "draft tokens"),
        (Slice(1, 0, 5, [1], sampling=Sampling(top_p=0.0)), "top_p"),
        (Slice(1, 8, 0, [1]), "slot 8"),
        (Slice(1, -1, 0, [1]), "slot -1"),
    ],
)
def test_a_slice_that_cannot_be_run_fails_alone(
    engine: Any, answer: list[int], work: Slice, complaint: str
) -> None:
    engine.run([Slice(1, 0, 0, PROMPT, sample=False)])
    failed, good = engine.run([work, verify(1, answer[:2])])
    assert complaint in failed.error
    assert failed.tokens == []
    assert good.tokens == answer[:3]
    if work.slot == 0:
        assert engine.held(0) == 0
        assert engine.run([verify(0, [])])[0].tokens == answer[:1]


def test_a_context_can_be_filled_to_its_last_token(engine: Any) -> None:
    long = [i % 256 for i in range(250)]
    [result] = engine.run([Slice(1, 0, 0, long + [1] * 6, 6)])
    assert result.tokens[:1] == reference(long, Sampling(), 1)
    assert engine.held(0) == 250 + result.accepted


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


def test_logprobs_are_the_targets_own(engine: Any, answer: list[int]) -> None:
    [none] = engine.run([verify(0, answer[:2])])
    assert none.logprobs == []
    [bare] = engine.run([verify(1, answer[:2], logprobs=0)])
    assert [entry.token for entry in bare.logprobs] == answer[:3]
    assert all(entry.top == [] and entry.logprob < 0 for entry in bare.logprobs)
    [full] = engine.run([verify(2, [], logprobs=512)])
    [entry] = full.logprobs
    assert math.fsum(math.exp(top.logprob) for top in entry.top) == pytest.approx(1.0)
    assert [t.logprob for t in entry.top] == sorted((t.logprob for t in entry.top), reverse=True)
    assert entry.logprob == next(t.logprob for t in entry.top if t.token == entry.token)


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


def test_a_closed_engine_says_so(tmp_path_factory: pytest.TempPathFactory) -> None:
    with engine_of(folder_of_tiny(tmp_path_factory.mktemp("hf")), slots=1, slot_tokens=64) as engine:
        engine.close()
        engine.close()
        with pytest.raises(EngineError, match="closed"):
            engine.run([Slice(1, 0, 0, [1])])


@pytest.mark.parametrize(("slots", "slot_tokens"), [(0, 100), (1, 31)])
def test_an_engine_without_room_is_refused(slots: int, slot_tokens: int, tmp_path_factory: Any) -> None:
    with (
        pytest.raises(EngineError, match="at least one"),
        engine_of(tmp_path_factory.mktemp("x"), slots=slots, slot_tokens=slot_tokens),
    ):
        pass
