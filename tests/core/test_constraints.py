"""Constraints on the target's choice: the rule on hand-made logits, and along drafts what plain decoding sees."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wisp.core.draft.drafter import Drafter
from wisp.core.draft.policies import CERTAIN, Fixed, Odds
from wisp.core.draft.signals import Signal
from wisp.core.draft.task import Task
from wisp.core.errors import GrammarError
from wisp.core.protocol.constraints import Constraints, Grammar
from wisp.core.protocol.edits import Bits, Edit, Tracker
from wisp.core.protocol.messages import Draft, Verdict
from wisp.core.protocol.reasoning import ReasoningEnd
from wisp.core.protocol.sampling import Sampling, target_token, verify

SIZE = 40
# What ids say; those below 10 and above 29 are no text.
TEXTS = (
    "<", "/", "think", ">", "</", "think>", ">\n", "</think>", "</think>\n", "x", "k>", "thin", "/th", " <", "k>\n\n",
    "think>{", "ink></th", "<<", "/think", "a</think>b",
)  # fmt: skip
PIECES = [*[b""] * 10, *(text.encode() for text in TEXTS), *[b""] * 10]
END = (14, 12, 13)  # "</think>" as a tokenizer cuts it
LOGITS = np.linspace(2.0, -1.9, SIZE).astype(np.float32)  # id 0 is the likeliest, 20 on are negative


def bits(*ids: int) -> Bits:
    mask = np.zeros((SIZE + 31) // 32, np.uint32)
    for i in ids:
        mask[i // 32] |= np.uint32(1 << i % 32)
    return mask


class Stairs:
    """A matcher of a toy grammar: each token is at most two above the sum of those before it, modulo SIZE; 39 ends it,
    and nothing but itself can follow."""

    def __init__(self) -> None:
        self.asked = 0

    def allowed(self, before: Sequence[int]) -> list[int]:
        if 39 in before:
            return [39]
        low = sum(before) % (SIZE - 3)
        return [low, low + 1, low + 2, 39]

    def masks(self, before: Sequence[int], draft: Sequence[int]) -> list[Bits]:
        self.asked += 1
        masks = []
        for i in range(len(draft) + 1):
            ids = self.allowed([*before, *draft[:i]])
            masks.append(bits(*ids))
            if i < len(draft) and draft[i] not in ids:
                break
        return masks

    def matcher(self, grammar: Grammar) -> Stairs:
        return Stairs()

    def end(self, after: tuple[int, ...]) -> ReasoningEnd:
        return ReasoningEnd(after, PIECES)


def edit_after(
    output: Sequence[int], constraints: Constraints, prompt: Sequence[int] = (), **more: object
) -> Edit:
    sampling = Sampling(constraints=constraints, **more)  # type: ignore[arg-type]
    return next(Tracker(sampling, Stairs()).edits([*prompt, *output], len(output), ()))


def slow(
    logits: np.ndarray, c: Constraints, prompt: Sequence[int], output: Sequence[int], ends: Sequence[int]
) -> list[float]:
    """The rule spelt out, an id at a time."""

    def single(x: float) -> float:
        return float(np.float32(x))

    keep = set(range(len(logits)))
    allowed = set(c.allowed) if c.allowed is not None else keep
    banned = {s[-1] for s in c.banned if list(s[:-1]) == list(output[len(output) - len(s) + 1 :])}
    for some in (keep & allowed, keep - banned, keep - set(ends)):
        keep = keep & some or keep
    scores = []
    for i, logit in enumerate(logits):
        score = single(float(logit) + dict(c.logit_bias).get(i, 0.0))
        if i in prompt or i in output:
            score = single(score / c.repetition_penalty if score > 0 else score * c.repetition_penalty)
        count = list(output).count(i)
        score = single(score - (c.frequency_penalty * count + c.presence_penalty * (count > 0)))
        scores.append(score if i in keep else -math.inf)
    return scores


ids = st.integers(0, SIZE - 1)
constraints = st.builds(
    Constraints,
    logit_bias=st.dictionaries(ids, st.sampled_from([-100.0, -1.5, 0.25, 100.0]), max_size=4).map(
        lambda d: tuple(d.items())
    ),
    frequency_penalty=st.sampled_from([0.0, 0.5, -1.0]),
    presence_penalty=st.sampled_from([0.0, 1.25, -0.5]),
    repetition_penalty=st.sampled_from([1.0, 1.5, 0.8]),
    banned=st.lists(st.lists(ids, min_size=1, max_size=3).map(tuple), max_size=4).map(tuple),
    allowed=st.none() | st.lists(ids, min_size=1, max_size=6, unique=True).map(tuple),
)
few = st.lists(st.integers(0, 5), max_size=12)


@given(constraints, few, few, st.integers(0, 3))
def test_the_edit_is_the_rule_spelt_out(
    c: Constraints, prompt: list[int], output: list[int], least: int
) -> None:
    edit = edit_after(output, c, prompt, min_tokens=len(output) + least, ends=(0, 1))
    expected = slow(LOGITS, c, prompt, output, (0, 1) if least else ())
    assert edit.apply(LOGITS).tolist() == expected


def test_each_constraint_by_hand() -> None:
    assert edit_after([], Constraints(((3, 5.0),))).apply(LOGITS)[3] == pytest.approx(5.0 + LOGITS[3])
    assert target_token(LOGITS, Sampling(), 0, edit_after([], Constraints(allowed=(7, 9)))) == 7
    assert target_token(LOGITS, Sampling(), 0, edit_after([], Constraints(banned=((0,), (1,))))) == 2
    pair = Constraints(banned=((4, 0),))
    assert [target_token(LOGITS, Sampling(), 1, edit_after([t], pair)) for t in (3, 4)] == [0, 1]
    twice = edit_after([0, 0, 25], Constraints(frequency_penalty=0.5, presence_penalty=0.25)).apply(LOGITS)
    assert twice[[0, 25, 1]].tolist() == pytest.approx([2.0 - 1.25, LOGITS[25] - 0.75, LOGITS[1]])
    seen = edit_after([25], Constraints(repetition_penalty=2.0), prompt=[0]).apply(LOGITS)
    assert seen[[0, 25, 1]].tolist() == pytest.approx([1.0, 2.0 * LOGITS[25], LOGITS[1]])


def test_a_constraint_that_leaves_no_token_is_passed_over() -> None:
    nothing = Constraints(allowed=(5, 6), banned=((5,), (6,)))
    assert edit_after([], nothing).keeps(SIZE).nonzero()[0].tolist() == [5, 6]
    grammar = Constraints(allowed=(30,), grammar=Grammar("regex", "x"))
    assert edit_after([], grammar).keeps(SIZE).nonzero()[0].tolist() == [
        0,
        1,
        2,
        39,
    ]  # the grammar comes first
    ended = edit_after([39], Constraints(grammar=Grammar("regex", "x")), min_tokens=9, ends=(39,))
    assert (ended.forced(), ended.allows(39)) == (39, False)


def test_log_probabilities_and_logits_are_left_alone() -> None:
    before = LOGITS.copy()
    edit_after([0], Constraints(((0, -100.0),), repetition_penalty=2.0)).apply(LOGITS)
    assert np.array_equal(LOGITS, before)


def test_ids_that_a_drafter_does_not_have_are_no_matter() -> None:
    edit = edit_after([38], Constraints(((39, 1.0),), 1.0, banned=((38,),), repetition_penalty=2.0))
    assert edit.apply(LOGITS[:10]).shape == (10,)


def test_forced_ids() -> None:
    assert edit_after([], Constraints(allowed=(7,))).forced() == 7
    assert edit_after([], Constraints(allowed=(7, 8), banned=((8,),))).forced() == 7
    assert edit_after([], Constraints(allowed=(7, 8))).forced() is None
    assert edit_after([], Constraints(banned=((8,),))).forced() is None


# --- along drafts


def reference(constraints: Constraints, prompt: list[int], n: int, seed: int) -> list[int]:
    """Plain decoding, from scratch at each position."""
    said: list[int] = []
    while len(said) < n:
        sampling = Sampling(1.0, seed=seed, constraints=constraints, min_tokens=3, ends=(39,))
        edit = next(Tracker(sampling, Stairs()).edits([*prompt, *said], len(said), ()))
        said.append(target_token(row(prompt, said, seed), sampling, len(said), edit))
    return said


def row(prompt: Sequence[int], said: Sequence[int], seed: int) -> np.ndarray:
    """The logits of a model of nothing."""
    source = np.random.default_rng([seed, len(said), sum(said) + sum(prompt)])
    return (2 * source.standard_normal(SIZE)).astype(np.float32)


grammars = st.none() | st.sampled_from(
    [Grammar("regex", "x"), Grammar("regex", "x", (2,)), Grammar("regex", "x", (0, 1))]
)


@given(constraints, grammars, few, st.integers(0, 9), st.data())
def test_any_history_of_drafts_and_rollbacks_says_what_plain_decoding_says(
    c: Constraints, grammar: Grammar | None, prompt: list[int], seed: int, data: st.DataObject
) -> None:
    c = msgspec.structs.replace(c, grammar=grammar)
    expected = reference(c, prompt, 14, seed)
    sampling = Sampling(1.0, seed=seed, constraints=c, min_tokens=3, ends=(39,))
    tracker = Tracker(sampling, Stairs())
    for _ in range(6):  # from anywhere, back and forth, as when a session is resumed
        at = data.draw(st.integers(0, 9))
        right = data.draw(st.integers(0, 4))
        draft = expected[at : at + right] + data.draw(st.lists(ids, max_size=3))
        rows = (row(prompt, [*expected[:at], *draft[:i]], seed) for i in range(len(draft) + 1))
        edits = tracker.edits([*prompt, *expected[:at]], at, draft)
        accepted, tokens = verify(rows, draft, sampling, at, edits)
        assert tokens == expected[at : at + accepted + 1]


def test_a_grammar_may_begin_inside_a_draft_and_is_asked_once_for_all_of_it() -> None:
    matchers = Stairs()
    tracker = Tracker(Sampling(constraints=Constraints(grammar=Grammar("regex", "x", (2, 5)))), matchers)
    stairs = tracker._matcher
    assert isinstance(stairs, Stairs)
    edits = list(tracker.edits([9, 2], 2, [7, 2, 5, 0, 1]))
    assert [e.mask is None for e in edits] == [True, True, True, False, False, False]
    assert [e.allows(0) for e in edits[3:]] == [True, True, False]
    assert stairs.asked == 1
    edits = list(tracker.edits([9, 2], 2, [7, 2, 4, 0, 1]))  # another draft, in which it does not end
    assert [e.mask for e in edits] == [None] * 6
    edits = list(tracker.edits([9, 2, 5], 3, [30, 1]))  # the grammar does not have 30
    assert len(edits) == 1
    assert not edits[0].allows(30)


# --- where reasoning ends


@given(st.lists(st.integers(10, 29), max_size=12))
def test_an_end_of_several_tokens_is_a_text_however_it_is_cut(output: list[int]) -> None:
    """Spelt out on the text: its first place, and the tokens that would say more in one."""
    end, marker = ReasoningEnd(END, PIECES), b"</think>"
    reached = [end.reached(output, n) for n in range(1, len(output) + 1)]
    texts = [b"".join(PIECES[t] for t in output[:n]) for n in range(len(output) + 1)]
    first = next((n for n, text in enumerate(texts) if marker in text), len(texts))
    assert (reached.index(True) + 1 if True in reached else len(texts)) == first
    for n, text in enumerate(texts[:first]):
        beyond = [t for t in range(SIZE) if marker in (text + PIECES[t])[:-1]]
        assert sorted(set(end.barred(output[:n]))) == beyond


@pytest.mark.parametrize("after", [(3,), (3, 4), (3, 17, 4), (50,), (17, 50)])
def test_an_end_that_is_no_text_is_its_ids(after: tuple[int, ...]) -> None:
    end = ReasoningEnd(after, PIECES)
    assert [end.reached([17, *after, 3], n) for n in range(1, len(after) + 3)] == [
        n == len(after) + 1 or (after == (3,) and n == 3) for n in range(1, len(after) + 3)
    ]
    assert end.barred([17, *after]) == []


def test_a_long_end_costs_no_more_than_the_vocabulary_is_long() -> None:
    """Any client names the tokens of an end, and others wait while it is looked up."""

    class Counted(bytes):
        looks = 0

        def __len__(self) -> int:
            Counted.looks += 1
            return super().__len__()

        def startswith(self, *args: Any) -> bool:
            Counted.looks += 1
            return super().startswith(*args)

    pieces = [Counted(b"ab" * (i % 4) + b"c") for i in range(40)] + [b"ab" * 2]
    end = ReasoningEnd((40,) * 64, pieces)
    assert Counted.looks <= len(pieces) + sum(map(len, pieces))
    assert end.reached([40] * 64, 64)
    assert not end.reached([40] * 64, 63)
    assert end.barred([40] * 63 + [2] * 2) == []
    assert set(end.barred([40] * 63)) == {i for i in range(40) if i % 4 >= 2}
    with pytest.raises(GrammarError, match="at most 256 bytes"):
        ReasoningEnd((40,) * 64 + (0,), pieces)


@given(st.integers(0, 40), st.data())
def test_an_end_of_several_tokens_inside_any_draft_says_what_plain_decoding_says(
    seed: int, data: st.DataObject
) -> None:
    words = (*END, 10, 11, 15, 16, 18, 24, 29, 0, 1, 2, 39)
    c = Constraints(grammar=Grammar("regex", "x", END), allowed=words, logit_bias=((14, 3.0), (12, 2.0)))
    expected = reference(c, [1], 24, seed)
    sampling = Sampling(1.0, seed=seed, constraints=c, min_tokens=3, ends=(39,))
    tracker = Tracker(sampling, Stairs())
    for _ in range(6):
        at = data.draw(st.integers(0, 15))
        right = data.draw(st.integers(0, 5))
        draft = expected[at : at + right] + data.draw(st.lists(st.sampled_from(words), max_size=3))
        rows = (row([1], [*expected[:at], *draft[:i]], seed) for i in range(len(draft) + 1))
        accepted, tokens = verify(rows, draft, sampling, at, tracker.edits([1, *expected[:at]], at, draft))
        assert tokens == expected[at : at + accepted + 1]


def test_a_grammar_begins_behind_an_end_of_several_tokens_in_a_draft() -> None:
    tracker = Tracker(Sampling(constraints=Constraints(grammar=Grammar("regex", "x", END))), Stairs())
    # "<" "/" "thin" "k>", and then 0, 1 of the grammar
    edits = list(tracker.edits([9, 10], 2, [11, 21, 20, 0, 1]))
    assert [e.mask is None for e in edits] == [True, True, True, False, False, False]
    # "k>" and two line breaks, behind "</thin"
    assert [e.allows(24) for e in edits[:3]] == [True, True, False]
    assert [e.allows(20) for e in edits[:3]] == [True] * 3


# --- values


@pytest.mark.parametrize(
    ("wrong", "parameter"),
    [
        (Constraints(((1, 101.0),)), "logit_bias"),
        (Constraints(((1, math.nan),)), "logit_bias"),
        (Constraints(((1, 1.0), (1, 2.0))), "logit_bias"),
        (Constraints(frequency_penalty=2.1), "frequency_penalty"),
        (Constraints(presence_penalty=math.nan), "presence_penalty"),
        (Constraints(repetition_penalty=0.0), "repetition_penalty"),
        (Constraints(banned=((),)), "bad_words"),
        (Constraints(allowed=()), "allowed_token_ids"),
        (Constraints(stop_token_ids=(-1,)), "token ids"),
        (Constraints(stop_token_ids=tuple(range(257))), "stop_token_ids"),
        (Constraints(grammar=Grammar("regex", "")), "grammar"),
        (Constraints(grammar=Grammar("json_schema", "x" * 65_537)), "grammar"),
    ],
)
def test_errors_name_the_parameter(wrong: Constraints, parameter: str) -> None:
    problem = Sampling(constraints=wrong).problem()
    assert problem is not None
    assert problem[0] == parameter


def test_nothing_is_wrong_with_the_usual() -> None:
    usual = Constraints(((1, -100.0),), 2.0, -2.0, 1.1, ((1, 2),), (3,), (4,), Grammar("json_object"))
    assert Sampling(constraints=usual).problem() is None
    assert not Constraints(stop_token_ids=(4,)).choosing


# --- what is certain


def test_certain_tokens_join_the_draft_with_the_one_before_them() -> None:
    sampling = Sampling(constraints=Constraints(stop_token_ids=(17,)))
    made = Drafter("s", Task([5], sampling, 40), Fixed(4), frozenset({99}))
    made.connected(0.0, 16)
    made.verdict(100.0, Verdict("s", 0, 0, 0, [10]))
    assert made.proposed(110.0, 11, Signal(0.5), 5.0, (12, 13)) == []
    assert made.chain.p == [0.5, 1.0, 1.0]
    [draft] = made.proposed(120.0, 17, Signal(0.9), 5.0, (18,))  # nothing follows the end
    assert isinstance(draft, Draft)
    assert draft.tokens == [11, 12, 13, 17]


def test_certain_tokens_teach_nothing_and_take_no_time() -> None:
    made = Drafter("s", Task([5], Sampling(), 40), Fixed(2), frozenset({99}))
    made.connected(0.0, 16)
    made.verdict(100.0, Verdict("s", 0, 0, 0, [10]))
    made.proposed(110.0, 11, Signal(confidence=1.0, certain=True), 0.1)
    made.proposed(120.0, 12, Signal(confidence=0.5), 0.1)
    assert made.times.draft.n == 0  # the first step of the model itself reads the prompt
    assert Odds(1.0, 0.0, certain=True) == CERTAIN
