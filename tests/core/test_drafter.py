"""The drafter by itself: hand-made verdicts and refusals in, messages out."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from wisp.core.draft.drafter import Drafter
from wisp.core.draft.policies import Ahead, DraftingPolicy, Fixed, Odds, View
from wisp.core.draft.refusals import LONGEST_WAIT_S, MAX_REOPENINGS, REOPEN
from wisp.core.draft.signals import Signal
from wisp.core.draft.task import Action, Phase, Reopen, Task
from wisp.core.errors import ProtocolError, RequestError
from wisp.core.protocol.messages import Draft, Open, Refused, Verdict
from wisp.core.protocol.sampling import Sampling
from wisp.core.protocol.step import Committed

EOS = 99
PROMPT = [50, 51]


class Always(Ahead, frozen=True):
    """Drafts ahead at any price, and keeps it until the verdict."""

    send: bool = False

    def worth(self, view: View, price: float = 0.0) -> bool:
        return True


class Scripted(Fixed):
    """Fixed, in server mode as told; remembers what it was taught."""

    def __init__(self, k: int) -> None:
        super().__init__(k)
        self.serving = False
        self.observed: list[tuple[int, int]] = []

    def serve(self, view: View) -> bool:
        return self.serving

    def observe(self, odds: Iterable[Odds], accepted: int) -> None:
        self.observed.append((len(list(odds)), accepted))


def drafter(
    policy: DraftingPolicy | None,
    *,
    max_tokens: int = 40,
    ahead: Ahead | None = None,
    ignore_eos: bool = False,
) -> Drafter:
    task = Task(PROMPT, Sampling(), max_tokens, ignore_eos=ignore_eos)
    return Drafter("s", task, policy, frozenset({EOS}), ahead=ahead)


def opened(
    policy: DraftingPolicy,
    *,
    max_draft: int = 16,
    max_tokens: int = 40,
    ahead: Ahead | None = None,
    max_branches: int = 0,
) -> Drafter:
    """The prompt is read and the first token, 10, is committed: drafting begins."""
    made = drafter(policy, max_tokens=max_tokens, ahead=ahead)
    made.connected(0.0, max_draft, "", max_branches)
    actions = made.verdict(100.0, Verdict("s", 0, 0, 0, [10]))
    assert actions == [Committed([10])]
    assert made.phase is Phase.DRAFTING
    return made


def propose(made: Drafter, *tokens: int | None) -> list[Action]:
    """The draft engine's tokens, while it is asked for any."""
    actions: list[Action] = []
    for token in tokens:
        assert made.wants_token(0.0)
        actions += made.proposed(110.0, token, Signal(0.9), 5.0)
    return actions


def only_draft(actions: list[Action]) -> Draft:
    (found,) = [a for a in actions if isinstance(a, Draft)]
    return found


# --- a round


def test_a_round_from_prompt_to_correction() -> None:
    policy = Scripted(3)
    made = opened(policy)
    assert made.context() == [50, 51, 10]
    sent = only_draft(propose(made, 11, 12, 13))
    assert (sent.round, sent.base, sent.tokens, sent.serve) == (1, 1, [11, 12, 13], False)
    assert not made.wants_token(0.0)
    actions = made.verdict(200.0, Verdict("s", 1, 1, 1, [11, 20]))
    assert actions == [Committed([11, 20], drafted=3, accepted=1, from_draft=1)]
    assert made.committed == [10, 11, 20]
    assert policy.observed[-1] == (2, 1)  # 13 was never looked at
    assert made.context() == [50, 51, 10, 11, 20]


def test_a_draft_accepted_whole_teaches_successes_only() -> None:
    policy = Scripted(2)
    made = opened(policy)
    propose(made, 11, 12)
    made.verdict(200.0, Verdict("s", 1, 1, 2, [11, 12, 13]))
    assert policy.observed[-1] == (2, 2)
    assert made.committed == [10, 11, 12, 13]


def test_an_engine_with_nothing_to_propose_sends_what_there_is() -> None:
    made = opened(Fixed(4))
    assert only_draft(propose(made, 11, None)).tokens == [11]
    made.verdict(200.0, Verdict("s", 1, 1, 1, [11, 12]))
    assert only_draft(propose(made, None)).tokens == []


def test_the_time_from_sending_to_arrival_is_what_was_waited() -> None:
    made = opened(Fixed(1))
    propose(made, 11)  # sent at 110
    made.verdict(180.0, Verdict("s", 1, 1, 1, [11, 12]), 150.0)  # read late: a draft step was running
    assert made.times.wait.value == 40.0


# --- drafting ahead


def test_an_agreeing_verdict_leaves_what_was_drafted_ahead_ready() -> None:
    made = opened(Fixed(2), ahead=Always())
    propose(made, 11, 12)
    propose(made, 13, 14, 15)
    actions = made.verdict(200.0, Verdict("s", 1, 1, 2, [11, 12, 13]))
    sent = only_draft(actions)  # at once
    assert (sent.base, sent.tokens) == (4, [14, 15])
    assert made.chain.wasted == 0
    assert made.phase is Phase.IN_FLIGHT


def test_too_few_drafted_ahead_are_completed_first() -> None:
    made = opened(Fixed(3), ahead=Always())
    propose(made, 11, 12, 13)
    propose(made, 14, 15)
    actions = made.verdict(200.0, Verdict("s", 1, 1, 3, [11, 12, 13, 14]))
    assert not any(isinstance(a, Draft) for a in actions)
    assert made.context()[-1] == 15
    assert only_draft(propose(made, 16, 17)).tokens == [15, 16, 17]


@pytest.mark.parametrize(
    ("accepted", "tokens"), [(0, [20]), (1, [11, 20]), (2, [11, 12, 20])], ids=["first", "last", "bonus"]
)
def test_a_disagreeing_verdict_clears_what_was_drafted_ahead(accepted: int, tokens: list[int]) -> None:
    made = opened(Fixed(2), ahead=Always())
    propose(made, 11, 12)
    propose(made, 13, 14, 15)
    actions = made.verdict(200.0, Verdict("s", 1, 1, accepted, tokens))
    assert not any(isinstance(a, Draft) for a in actions)
    assert made.chain.wasted == 3
    assert made.context() == [*PROMPT, 10, *tokens]
    assert only_draft(propose(made, 30, 31)).tokens == [30, 31]


def test_drafting_ahead_begins_with_the_prompt() -> None:
    made = drafter(Fixed(2), ahead=Always())
    made.connected(0.0, 16)
    assert propose(made, 10, 11, 12) == []
    sent = only_draft(made.verdict(100.0, Verdict("s", 0, 0, 0, [10])))
    assert (sent.base, sent.tokens) == (1, [11, 12])


def test_the_next_guess_is_judged_by_the_bonus_token() -> None:
    policy = Scripted(2)
    made = opened(policy, ahead=Always())
    propose(made, 11, 12)
    propose(made, 13, 14)
    made.verdict(200.0, Verdict("s", 1, 1, 2, [11, 12, 20]))
    assert policy.observed[-1] == (3, 2)


def test_without_ahead_nothing_is_drafted_in_flight() -> None:
    made = opened(Fixed(2))
    propose(made, 11, 12)
    assert not made.wants_token(1e6)


# --- sending ahead


class Bold(Always, frozen=True):
    """Drafts ahead at any price, and does not wait for the verdict to send it."""

    send: bool = True


def bold(k: int) -> tuple[Drafter, Draft, Draft]:
    """A draft in flight, and the next one behind it: 11, 12 | its bonus 13, and 14, 15."""
    made = opened(Fixed(k), ahead=Bold())
    first = only_draft(propose(made, 11, 12))
    assert propose(made, 13, 14) == []
    second = only_draft(propose(made, 15))
    return made, first, second


def test_a_complete_draft_leaves_before_the_verdict_that_it_bets_on() -> None:
    _, first, second = bold(2)
    assert (first.round, first.base, first.tokens) == (1, 1, [11, 12])
    assert (second.round, second.base, second.tokens) == (2, 1, [11, 12, 13, 14, 15])


def test_a_bet_that_is_won_saves_the_round_trip() -> None:
    made, _, _ = bold(2)
    assert made.verdict(200.0, Verdict("s", 1, 1, 2, [11, 12, 13])) == [
        Committed([11, 12, 13], drafted=2, accepted=2, from_draft=2)
    ]
    assert (made.phase, made.chain.sent, made.chain.tokens) == (Phase.IN_FLIGHT, 2, [14, 15])
    (told,) = [
        a
        for a in made.verdict(220.0, Verdict("s", 2, 1, 5, [11, 12, 13, 14, 15, 16]))
        if isinstance(a, Committed)
    ]
    assert told == Committed([14, 15, 16], drafted=2, accepted=2, from_draft=2)
    assert made.chain.wasted == 0


@pytest.mark.parametrize("tokens", [[20], [11, 20], [11, 12, 20]], ids=["first", "last", "bonus"])
def test_a_bet_that_is_lost_is_forgotten_at_once(tokens: list[int]) -> None:
    made, _, second = bold(2)
    made.verdict(200.0, Verdict("s", 1, 1, len(tokens) - 1, tokens))
    assert (made.phase, made.chain.tokens, made.chain.wasted) == (Phase.DRAFTING, [], 3)
    made.verdict(201.0, Verdict("s", second.round, 1, len(tokens) - 1, tokens))  # stale
    assert (made.phase, made.committed) == (Phase.DRAFTING, [10, *tokens])
    assert only_draft(propose(made, 30, 31)).base == 1 + len(tokens)


def test_only_one_draft_is_sent_ahead() -> None:
    made, _, _ = bold(2)
    assert propose(made, 16, 17, 18, 19) == []


# --- ends


def test_nothing_is_drafted_after_an_end_of_sequence() -> None:
    made = opened(Fixed(8), ahead=Always())
    assert only_draft(propose(made, 11, EOS)).tokens == [11, EOS]
    assert not made.wants_token(0.0)
    (last,) = made.verdict(200.0, Verdict("s", 1, 1, 2, [11, EOS], "stop"))
    assert isinstance(last, Committed)
    assert (last.tokens, last.finish, last.from_draft) == ([11, EOS], "stop", 2)
    assert made.phase is Phase.DONE
    assert made.verdict(201.0, Verdict("s", 1, 1, 2, [11, EOS], "stop")) == []
    assert made.connected(300.0, 16) == []


def test_an_end_of_sequence_is_a_token_like_any_other_if_it_is_to_be_ignored() -> None:
    made = drafter(Fixed(3), ignore_eos=True)
    made.connected(0.0, 16)
    made.verdict(100.0, Verdict("s", 0, 0, 0, [10]))
    assert only_draft(propose(made, 11, EOS, 13)).tokens == [11, EOS, 13]


@pytest.mark.parametrize("k", [1, 3, 8])
@pytest.mark.parametrize("max_tokens", [2, 3, 5, 9])
def test_no_draft_reaches_beyond_max_tokens(k: int, max_tokens: int) -> None:
    """The last token of all is the target's own."""
    made = drafter(Fixed(k), max_tokens=max_tokens, ahead=Always())
    actions = made.connected(0.0, 16)
    for _ in range(40):
        while made.wants_token(0.0):
            actions = made.proposed(0.0, 10 + made.position, Signal(0.9), 1.0)
            assert len(made.committed) + len(made.chain.tokens) <= max_tokens - 1
            if actions:
                break
        sent = [a for a in actions if isinstance(a, Draft)]
        if sent:
            assert len(sent[0].tokens) <= max_tokens - len(made.committed) - 1
        base, draft = len(made.committed), made.chain.tokens[: made.chain.sent]
        tokens = [*draft, 10 + base + len(draft)]
        finish = "length" if base + len(tokens) == max_tokens else ""
        actions = made.verdict(0.0, Verdict("s", made.rounds.number, base, len(draft), tokens, finish))
        if finish:
            break
    assert made.committed == list(range(10, 10 + max_tokens))
    assert made.phase is Phase.DONE


def test_no_draft_is_longer_than_the_verifier_takes() -> None:
    made = opened(Fixed(8), max_draft=3, ahead=Always())
    assert only_draft(propose(made, 11, 12, 13)).tokens == [11, 12, 13]
    propose(made, 14, 15, 16, 17, 18)
    sent = only_draft(made.verdict(200.0, Verdict("s", 1, 1, 3, [11, 12, 13, 14])))
    assert sent.tokens == [15, 16, 17]


# --- broken connections


def test_a_draft_in_flight_that_is_lost_rides_along() -> None:
    made = opened(Fixed(2), ahead=Always())
    propose(made, 11, 12)
    propose(made, 13)
    made.lost()
    assert not made.wants_token(0.0)
    assert made.proposed(0.0, 14, Signal()) == []  # the step that was running comes too late
    (again,) = made.connected(500.0, 16)
    assert isinstance(again, Open)
    assert (again.epoch, again.committed, again.draft) == (1, [10], [11, 12])
    assert again.prompt == PROMPT
    sent = only_draft(
        [*made.verdict(600.0, Verdict("s", again.round, 1, 2, [11, 12, 13])), *propose(made, 14, 15)]
    )
    assert (sent.base, sent.tokens) == (4, [14, 15])


def test_a_draft_in_the_making_rides_along() -> None:
    made = opened(Fixed(4))
    propose(made, 11, 12)
    made.lost()
    (again,) = made.connected(500.0, 16)
    assert isinstance(again, Open)
    assert again.draft == [11, 12]


def test_another_verifier_may_take_shorter_drafts() -> None:
    made = opened(Fixed(4))
    propose(made, 11, 12, 13, 14)
    made.lost()
    (again,) = made.connected(500.0, 2)
    assert isinstance(again, Open)
    assert again.draft == [11, 12]
    made.verdict(600.0, Verdict("s", again.round, 1, 2, [11, 12, 13]))
    assert made.committed == [10, 11, 12, 13]
    assert made.context()[-1] == 14  # still guessed


def test_a_verifier_to_which_a_router_sends_the_session_may_take_shorter_drafts() -> None:
    made = opened(Fixed(4))
    made.moved(2, 0)
    assert only_draft(propose(made, 11, 12)).tokens == [11, 12]


def test_an_old_verdict_after_reopening_settles_nothing() -> None:
    made = opened(Fixed(2))
    propose(made, 11, 12)
    made.lost()
    made.connected(500.0, 16)
    made.verdict(510.0, Verdict("s", 1, 1, 2, [11, 12, 13]))
    assert (made.committed, made.phase) == ([10, 11, 12, 13], Phase.IN_FLIGHT)
    settled = made.verdict(520.0, Verdict("s", 2, 1, 2, [11, 12, 13]))
    assert not any(
        isinstance(a, Committed) for a in settled
    )  # nothing new, and nothing that was verified again
    assert made.committed == [10, 11, 12, 13]
    assert made.phase is Phase.DRAFTING


@pytest.mark.parametrize(
    "verdict",
    [
        Verdict("s", 0, 3, 0, [14]),  # the one before it was missed
        Verdict("s", 0, 0, 0, [77]),  # of a verifier that was not quite the same
    ],
    ids=["gap", "contradiction"],
)
@pytest.mark.parametrize("serve", [False, True], ids=["drafting", "served"])
def test_an_old_verdict_that_does_not_fit_is_of_no_use(verdict: Verdict, serve: bool) -> None:
    """A session that comes back to a verifier on the same connection hears what that one said meanwhile."""
    made = drafter(None) if serve else opened(Fixed(2))
    if serve:
        made.connected(0.0, 16)
        made.verdict(100.0, Verdict("s", 0, 0, 0, [10]))
    else:
        propose(made, 11, 12)
    made.lost()
    (again,) = made.connected(500.0, 16)
    assert isinstance(again, Open)
    assert made.verdict(510.0, verdict) == []
    phase = Phase.SERVED if serve else Phase.IN_FLIGHT
    assert (made.committed, made.phase) == ([10], phase)
    made.verdict(520.0, Verdict("s", again.round, 1, 0, [13]))
    assert made.committed == [10, 13]


# --- server mode


def test_hand_over_to_the_verifier_and_back() -> None:
    policy = Scripted(2)
    made = opened(policy)
    propose(made, 11, 12)
    policy.serving = True
    asked = only_draft(made.verdict(200.0, Verdict("s", 1, 1, 0, [20])))
    assert (asked.serve, asked.tokens, asked.base) == (True, [], 2)
    assert not made.wants_token(0.0)
    made.verdict(210.0, Verdict("s", 2, 2, 0, [21]))
    assert made.phase is Phase.SERVED
    for i in range(22, 28):
        assert made.verdict(220.0 + i, Verdict("s", 2, i - 19, 0, [i])) == [Committed([i])]
        assert not made.wants_token(0.0)
    policy.serving = False
    made.verdict(260.0, Verdict("s", 2, 9, 0, [28]))
    assert made.wants_token(0.0)
    back = only_draft(propose(made, 29, 30))
    assert (back.serve, back.base, back.tokens) == (False, 10, [29, 30])
    assert made.committed == [10, *range(20, 29)]


def test_unasked_verdicts_measure_the_way_back() -> None:
    policy = Scripted(2)
    policy.serving = True
    made = drafter(policy)
    made.connected(0.0, 16)
    made.verdict(100.0, Verdict("s", 0, 0, 0, [10]))
    made.verdict(150.0, Verdict("s", 1, 1, 0, [11]))
    for i in range(6):
        made.verdict(170.0 + 20.0 * i, Verdict("s", 1, 2 + i, 0, [12 + i]))
    assert made.times.serve_ms == pytest.approx(20.0)


def test_an_edge_that_takes_drafts_for_dear_learns_from_tokens_that_came_without() -> None:
    """It sends nothing, the verifier decodes for it in the step that is running, and its empty draft comes too late."""
    made = drafter(Fixed(0), max_tokens=100)
    made.connected(0.0, 16)
    for i in range(10):
        made.times.verify.add(i % 2 * 3, 100.0 + i % 2 * 90.0)
        made.times.wait.add(0.0)
    assert made.times.verify.slope > 20.0
    draft = only_draft(made.verdict(100.0, Verdict("s", 0, 0, 0, [10])))
    for i in range(60):
        now, token = 200.0 + 100.0 * i, [11 + i]
        made.verdict(now, Verdict("s", draft.round - 1, draft.base, 0, token, engine_ms=100.0 + i % 4 * 60))
        draft = only_draft(made.verdict(now, Verdict("s", draft.round, draft.base, 0, token)))
    assert made.times.verify.slope < 3.0
    assert made.times.wait.value == pytest.approx(100.0, rel=0.01)


def served_then_drafting() -> Drafter:
    policy = Scripted(2)
    policy.serving = True
    made = drafter(policy, ahead=Always())
    made.connected(0.0, 16)
    made.verdict(100.0, Verdict("s", 0, 0, 0, [10]))
    made.verdict(110.0, Verdict("s", 1, 1, 0, [11]))
    policy.serving = False
    made.verdict(120.0, Verdict("s", 1, 2, 0, [12]))
    return made


def test_tokens_still_served_shorten_a_draft_that_agrees() -> None:
    made = served_then_drafting()
    assert propose(made, 13) == []
    assert made.verdict(130.0, Verdict("s", 1, 3, 0, [13])) == [Committed([13])]
    assert made.context()[-1] == 13
    sent = only_draft(propose(made, 14, 15))
    assert (sent.base, sent.tokens) == (4, [14, 15])
    made.verdict(140.0, Verdict("s", 1, 4, 0, [14]))  # crossed the draft on its way
    assert (made.chain.tokens, made.chain.sent) == ([15], 1)
    (settled, *_) = made.verdict(150.0, Verdict("s", 2, 4, 2, [14, 15, 16]))
    assert settled == Committed([15, 16], drafted=1, accepted=1, from_draft=1)  # 14 was not verified
    assert made.committed == [10, 11, 12, 13, 14, 15, 16]


def test_tokens_still_served_clear_a_draft_that_disagrees() -> None:
    made = served_then_drafting()
    sent = only_draft(propose(made, 13, 14))
    propose(made, 15, 16)
    made.verdict(140.0, Verdict("s", 1, 3, 0, [30]))
    assert made.chain.tokens == []
    assert made.chain.wasted == 2
    made.verdict(150.0, Verdict("s", sent.round, 3, 0, [30]))
    assert made.committed == [10, 11, 12, 30]
    assert made.phase is Phase.DRAFTING


def test_without_a_policy_the_verifier_decodes_from_the_start() -> None:
    made = drafter(None, ahead=Always())
    (first,) = made.connected(0.0, 16)
    assert isinstance(first, Open)
    assert first.serve
    for i in range(3):
        assert made.verdict(i, Verdict("s", 0, i, 0, [10 + i])) == [Committed([10 + i])]
        assert not made.wants_token(0.0)
    made.lost()
    (again,) = made.connected(9.0, 16)
    assert isinstance(again, Open)
    assert (again.serve, again.committed) == (True, [10, 11, 12])
    (last,) = made.verdict(10.0, Verdict("s", 1, 3, 0, [13], "length"))
    assert isinstance(last, Committed)
    assert last.finish == "length"


# --- verifiers that err or refuse


@pytest.mark.parametrize(
    "verdict",
    [
        Verdict("s", 1, 0, 0, [77, 78]),  # another first token than before
        Verdict("s", 1, 5, 0, [20]),  # tokens that nobody has seen come before it
    ],
    ids=["contradiction", "gap"],
)
def test_a_verdict_that_contradicts_what_stands_is_refused(verdict: Verdict) -> None:
    made = opened(Fixed(2))
    propose(made, 11, 12)
    with pytest.raises(ProtocolError) as error:
        made.verdict(200.0, verdict)
    assert error.value.code == "conflict"
    assert made.committed == [10]
    (again,) = made.connected(300.0, 16)
    assert isinstance(again, Open)
    assert again.committed == [10]


@pytest.mark.parametrize("code", sorted(REOPEN))
@pytest.mark.parametrize("after_s", [0.0, 2.5])
def test_some_refusals_are_mended_by_opening_again(code: str, after_s: float) -> None:
    made = opened(Fixed(2))
    propose(made, 11, 12)
    assert made.refused(Refused("s", code, "…", after_s)) == [Reopen(after_s)]
    assert made.phase is Phase.DETACHED
    (again,) = made.connected(300.0, 16)
    assert isinstance(again, Open)
    assert (again.committed, again.draft) == ([10], [11, 12])


def sent_ahead() -> tuple[Drafter, list[Draft]]:
    """Two drafts are with the verifier."""
    made = opened(Fixed(2), ahead=Always(send=True))
    first = only_draft(propose(made, 11, 12))
    return made, [first, only_draft(propose(made, 13, 14, 15))]


def test_drafts_in_flight_behind_a_failed_step_share_its_failure() -> None:
    made, sent = sent_ahead()
    for _ in range(MAX_REOPENINGS):
        failed = Refused("s", "engine_error", "failed", 1.0, True, sent[-1].round)
        assert made.refused(failed) == [Reopen(1.0)]
        for draft in sent:
            assert made.refused(Refused("s", "unknown_session", "no such", round=draft.round)) == []
        (again,) = made.connected(300.0, 16)
        assert isinstance(again, Open)
        for draft in sent:
            assert made.refused(Refused("s", "unknown_session", "no such", round=draft.round)) == []
        assert made.phase is Phase.IN_FLIGHT
        sent = [Draft("s", again.round, 1, [])]
    made.verdict(310.0, Verdict("s", sent[-1].round, 1, 0, [20]))
    assert made.committed == [10, 20]


@pytest.mark.parametrize("code", ["malformed", "conflict", "stale_epoch"])
def test_a_refusal_that_a_later_open_has_overtaken_ends_nothing(code: str) -> None:
    made, sent = sent_ahead()
    made.lost()
    made.connected(300.0, 16)
    assert made.refused(Refused("s", code, "of before", round=sent[0].round)) == []
    assert made.phase is Phase.IN_FLIGHT


def test_a_verifier_of_an_earlier_release_does_not_say_what_it_refuses() -> None:
    made, _ = sent_ahead()
    assert made.refused(Refused("s", "unknown_session", "no such")) == [Reopen(0.0)]
    assert made.refused(Refused("s", "unknown_session", "no such")) == []


def test_opening_again_without_getting_anywhere_ends() -> None:
    made = opened(Fixed(2))
    for _ in range(MAX_REOPENINGS):
        made.refused(Refused("s", "engine_error", "out of luck"))
        made.connected(300.0, 16)
    with pytest.raises(RequestError, match="out of luck") as error:
        made.refused(Refused("s", "engine_error", "out of luck"))
    assert error.value.status == 502
    assert made.phase is Phase.DONE


def test_a_new_token_gives_new_credit() -> None:
    made = opened(Fixed(2))
    for i in range(3 * MAX_REOPENINGS):
        assert made.refused(Refused("s", "engine_error", "")) == [Reopen(0.0)]
        (again,) = made.connected(300.0, 16)
        assert isinstance(again, Open)
        made.verdict(310.0, Verdict("s", again.round, 1 + i, 0, [20 + i]))


@pytest.mark.parametrize(
    ("code", "status", "kind"),
    [
        ("overloaded", 429, "server_error"),
        ("rate_limit_exceeded", 429, "rate_limit_error"),
        ("shutting_down", 503, "server_error"),
        ("context_length_exceeded", 400, "invalid_request_error"),
        ("malformed", 502, "server_error"),
        ("unauthorized", 502, "server_error"),
    ],
)
def test_refused_before_the_first_token(code: str, status: int, kind: str) -> None:
    made = drafter(Fixed(2))
    made.connected(0.0, 16)
    with pytest.raises(RequestError, match="because") as error:
        made.refused(Refused("s", code, "because", 7.0))
    assert (error.value.status, error.value.type, error.value.code) == (status, kind, code)
    assert error.value.retry_after == (7.0 if status in (429, 503) else None)
    assert made.phase is Phase.DONE


def test_a_busy_verifier_that_names_no_time_is_left_alone_for_a_second() -> None:
    made = drafter(Fixed(2))
    made.connected(0.0, 16)
    with pytest.raises(RequestError) as error:
        made.refused(Refused("s", "overloaded", "full"))
    assert error.value.retry_after == 1.0


@pytest.mark.parametrize("code", ["overloaded", "rate_limit_exceeded", "shutting_down"])
def test_a_text_that_has_begun_insists(code: str) -> None:
    made = opened(Fixed(2))
    for after_s, waits in ((0.0, 0.1), (3.0, 3.0)) * MAX_REOPENINGS:
        assert made.refused(Refused("s", code, "full", after_s)) == [Reopen(waits)]
        (again,) = made.connected(300.0, 16)
        assert isinstance(again, Open)
        assert again.committed == [10]


def test_a_first_step_that_reads_a_long_prompt_does_not_end_drafting() -> None:
    """Prefill is not what a draft step costs; neither is a step that was held up."""
    drafter = Drafter("session", Task([1], Sampling(), 20), Fixed(4), frozenset())
    drafter.connected(0.0, 8)
    drafter.verdict(10.0, Verdict("session", 0, 0, 0, [5]))
    drafter.proposed(3010.0, 6, Signal(0.9), 3000.0)
    assert drafter.times.draft.n == 0
    drafter.proposed(3030.0, 7, Signal(0.9), 20.0)
    assert drafter.times.draft.value == 20.0
    drafter.proposed(6030.0, 8, Signal(0.9), 3000.0)  # the device was busy with something else
    assert drafter.times.draft.value <= 40.0


def test_the_salt_of_a_task_goes_with_every_open() -> None:
    drafter = Drafter("session", Task([1], Sampling(), 20, salt="of-one"), Fixed(4), frozenset())
    for _ in range(2):
        [opening] = drafter.connected(0.0, 8)
        assert isinstance(opening, Open)
        assert opening.salt == "of-one"
        drafter.lost()


def test_a_session_goes_on_with_the_model_that_it_was_begun_with() -> None:
    made = drafter(None)
    (first,) = made.connected(0.0, 16, "wisp")
    assert isinstance(first, Open)
    assert first.digest == "wisp"
    made.verdict(1.0, Verdict("s", 0, 0, 0, [10]))
    made.lost()
    (again,) = made.connected(9.0, 16, "wisp")
    assert isinstance(again, Open)
    assert (again.committed, again.digest) == ([10], "wisp")


@pytest.mark.parametrize("committed", [[], [10, 11]])
def test_a_session_ends_where_the_model_has_changed(committed: list[int]) -> None:
    """Its prompt was encoded for the old one, so that it may not even begin with the new one."""
    made = drafter(None)
    made.connected(0.0, 16, "wisp")
    if committed:
        made.verdict(1.0, Verdict("s", 0, 0, 0, committed))
    made.lost()
    with pytest.raises(RequestError, match="other weights") as caught:
        made.connected(9.0, 16, "theirs")
    assert (caught.value.status, caught.value.code) == (502, "model_changed")
    assert made.phase is Phase.DONE
    assert made.connected(9.0, 16, "wisp") == []


def test_a_prompt_that_was_encoded_for_another_model_is_not_sent() -> None:
    made = Drafter("s", Task(PROMPT, Sampling(), 40, digest="wisp"), None, frozenset({EOS}))
    with pytest.raises(RequestError):
        made.connected(0.0, 16, "theirs")


@pytest.mark.parametrize("code", ["model_changed", "logits_not_finite"])
def test_permanent_failures_are_not_tried_again(code: str) -> None:
    made = opened(Fixed(2))
    with pytest.raises(RequestError, match="because") as caught:
        made.refused(Refused("s", code, "because"))
    assert caught.value.code == code
    assert made.phase is Phase.DONE


@pytest.mark.parametrize("heard", [Verdict("s", 0, 0, 0, [10] * 41), Verdict("s", 0, 1, 0, [10] * 40)])
def test_a_verifier_that_writes_more_than_was_asked_for_is_not_believed(heard: Verdict) -> None:
    made = drafter(Fixed(2))
    made.connected(0.0, 16)
    made.verdict(1.0, Verdict("s", 0, 0, 0, [10]))
    with pytest.raises(ProtocolError, match="more than it was asked for"):
        made.verdict(2.0, heard)
    assert made.committed == [10]


def test_a_verdict_from_before_the_beginning_is_not_believed() -> None:
    made = opened(Fixed(2))
    with pytest.raises(ProtocolError, match="contradicts"):
        made.verdict(2.0, Verdict("s", 0, -1, 0, [10]))


def test_no_more_is_accepted_than_was_drafted() -> None:
    made = drafter(Fixed(2))
    made.connected(0.0, 16)
    assert made.verdict(1.0, Verdict("s", 0, 0, 3, [10, 11, 12])) == [Committed([10, 11, 12])]


@pytest.mark.parametrize("asked", [float("nan"), float("inf"), -5.0, 1e300])
def test_a_wait_that_nobody_can_wait_is_cut_short(asked: float) -> None:
    made = opened(Fixed(2))
    (again,) = made.refused(Refused("s", "engine_error", "", asked, round=-1))
    assert isinstance(again, Reopen)
    assert 0.0 <= again.after_s <= LONGEST_WAIT_S
    new = drafter(Fixed(2))
    new.connected(0.0, 16)
    with pytest.raises(RequestError) as busy:
        new.refused(Refused("s", "overloaded", "", asked))
    assert busy.value.retry_after is not None
    assert 1.0 <= busy.value.retry_after <= LONGEST_WAIT_S
