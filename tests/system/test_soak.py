"""Many short sessions through one verifier: memory stays flat, nothing is left behind, and the sums add up."""

from __future__ import annotations

import random

import psutil
import pytest

from harness import Fleet, Peer, Process, ask, opening
from waiting import eventually
from wisp.core.protocol.messages import Draft, Open
from wisp.core.protocol.sampling import Sampling
from wisp.engines.null import null_token

pytestmark = pytest.mark.slow

WARM_UP = 200  # sessions
MAX_TOKENS = 24


class Sums:
    """What one side saw."""

    def __init__(self) -> None:
        self.sessions = self.tokens = self.drafts = self.drafted = self.accepted = 0


def short_session(peer: Peer, number: int, sums: Sums) -> None:
    """One session whose drafts are right as far as chance has it. Checks every token."""
    chance = random.Random(number)
    truth = [null_token(number, position) for position in range(MAX_TOKENS)]
    session, round_ = f"session-{number}", 0
    committed: list[int] = []

    def draft() -> list[int]:
        at, size = len(committed), min(chance.randint(0, 6), MAX_TOKENS - len(committed) - 1)
        right = chance.randint(0, size)
        tokens = [*truth[at : at + right], *((t + 1) % 256 for t in truth[at + right : at + size])]
        sums.drafts += bool(tokens)
        sums.drafted += len(tokens)
        sums.accepted += right
        return tokens

    prompt = [number % 256, *range(chance.randint(1, 40))]
    message: Open | Draft = opening(
        session, prompt=prompt, sampling=Sampling(seed=number), max_tokens=MAX_TOKENS, draft=draft()
    )
    while True:
        peer.say(message)
        verdict = peer.verdict()
        assert verdict.base == len(committed)
        committed += verdict.tokens
        if verdict.finish:
            break
        round_ += 1
        message = Draft(session, round_, len(committed), draft())
    assert (committed, verdict.finish) == (truth, "length")
    sums.sessions += 1
    sums.tokens += len(committed)


def check_sums(server: Process, sums: Sums) -> None:
    m = eventually(lambda: m if (m := server.metrics())["wisp:num_requests_running"] == 0 else {})
    assert m["wisp:kv_cache_usage_perc"] == 0
    assert m["wisp:num_requests_parked"] == 0
    assert m["wisp:num_requests_waiting"] == 0
    assert sum(v for k, v in m.items() if k.startswith("wisp:request_success_total")) == sums.sessions
    assert m["wisp:generation_tokens_total"] == sums.tokens
    assert m["wisp:e2e_request_latency_seconds_count"] == sums.sessions
    assert m["wisp:time_to_first_token_seconds_count"] == sums.sessions
    if sums.drafts:
        assert m["wisp:spec_decode_num_drafts_total"] == sums.drafts
        assert m["wisp:spec_decode_num_draft_tokens_total"] == sums.drafted
        assert m["wisp:spec_decode_num_accepted_tokens_total"] == sums.accepted
        places = [
            v for k, v in m.items() if k.startswith("wisp:spec_decode_num_accepted_tokens_per_pos_total")
        ]
        assert sum(places) == sums.accepted


@pytest.mark.modelless
@pytest.mark.parametrize("sessions", [400, pytest.param(2000, marks=pytest.mark.extended)])
def test_many_short_sessions_leave_nothing_behind(fleet: Fleet, sessions: int) -> None:
    server = fleet.serve(target="null", engine="null")
    memory = psutil.Process(server.pid).memory_info
    sums = Sums()
    with Peer(server.url) as peer:
        for number in range(WARM_UP):
            short_session(peer, number, sums)
        warm = memory().rss
        for number in range(WARM_UP, WARM_UP + sessions):
            short_session(peer, number, sums)
            if number % 100 == 0:  # edges come and go
                with Peer(server.url) as other:
                    short_session(other, 10_000 + number, sums)
        grown = memory().rss - warm
        check_sums(server, sums)
    assert grown < 8 << 20, f"{grown >> 10} kB"


def test_a_hundred_answers_of_the_tiny_target_leave_nothing_behind(fleet: Fleet, tiny_pair: None) -> None:
    server = fleet.serve()
    memory = psutil.Process(server.pid).memory_info
    sums = Sums()
    for number in range(100):
        answer = ask(server.url, f"Say {number % 37}.", max_tokens=6, seed=number, temperature=1.0)
        sums.sessions += 1
        sums.tokens += answer.usage["completion_tokens"]
        if number == 40:
            warm = memory().rss
    assert memory().rss - warm < 15 << 20
    check_sums(server, sums)
