"""The overhead benchmark: its script is what a verifier answers, and the whole runs and reports."""

import asyncio
import json

import pytest

from benchmarks import overhead
from benchmarks.overhead.client import Tally, play
from benchmarks.overhead.script import MAX_TOKENS, Round, Script, scripts
from wisp.core.errors import ProtocolError
from wisp.core.protocol.messages import Cancel, Hello, decode_edge_message, encode
from wisp.core.verify.admission import Admission
from wisp.core.verify.batching import batching_policy
from wisp.core.verify.events import Limits, Received, Run, Send, StepDone, Tick
from wisp.core.verify.verifier import Verifier
from wisp.engines.null import NullTarget


class VerifierPeer:
    """A connection to a verifier in this process, as the client sees it."""

    def __init__(self) -> None:
        self.engine = NullTarget(slots=2)
        i = self.engine.info
        limits = Limits(i.n_vocab, i.eos, i.slots, i.slot_tokens, i.kv_tokens, i.step_tokens, digest=i.digest)
        self.verifier = Verifier(limits, batching_policy("continuous"), Admission(4))
        self.inbox: list[bytes] = []

    async def send(self, frame: bytes) -> None:
        message = decode_edge_message(frame)
        assert not isinstance(message, Hello)
        actions = self.verifier.handle(0.0, Received(1, "", message))
        actions += self.verifier.handle(0.0, Tick())
        for action in actions:
            if isinstance(action, Run):
                actions += self.verifier.handle(0.0, StepDone(self.engine.run(action.slices), 0.1))
        self.inbox += [encode(a.message) for a in actions if isinstance(a, Send)]

    async def recv(self) -> bytes:
        return self.inbox.pop(0)


@pytest.mark.parametrize("committed", [0, 50])
def test_every_round_of_a_script_is_answered_as_it_says(committed: int) -> None:
    peer, tally = VerifierPeer(), Tally()
    one = scripts(1, committed)[0]

    async def play_it_twice() -> None:
        for _ in range(2):
            await play(peer, Script(one.rounds), 0.0, tally)  # one round, then again
            await peer.send(one.cancel)
            for round_ in one.rounds:
                await play(peer, Script([round_]), 0.0, tally)

    asyncio.run(play_it_twice())
    assert tally.rounds == 2 * (len(one.rounds) + 1)
    assert not peer.verifier.sessions  # the last verdict ended it
    assert sum(len(r.answer[3]) for r in one.rounds if r.answer is not None) == MAX_TOKENS


def test_a_wrong_token_is_noticed() -> None:
    peer = VerifierPeer()
    round_ = scripts(1)[0].rounds[0]
    assert round_.answer is not None
    number, base, accepted, tokens, finish = round_.answer
    wrong = Round(round_.frame, (number, base, accepted, [*tokens[:-1], tokens[-1] ^ 1], finish))
    with pytest.raises(ProtocolError, match="expected"):
        asyncio.run(play(peer, Script([wrong]), 0.0, Tally()))


def test_a_session_in_between_is_cancelled_when_time_is_up() -> None:
    peer = VerifierPeer()
    one = scripts(1)[0]
    assert isinstance(decode_edge_message(one.cancel), Cancel)
    asyncio.run(play(peer, one, 0.0, Tally()))
    assert not peer.verifier.sessions


@pytest.mark.slow
def test_the_benchmark_runs_and_reports(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(overhead, "REPEATS", 1)
    monkeypatch.setattr(overhead, "LONG", 100)
    assert overhead.run_bench(sessions=4, seconds=0.5, as_json=True) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["sessions"] == 4
    assert report["verifications_per_s"] > 0
    assert report["ratio"] == round(report["verifications_per_s"] / report["echo_rounds_per_s"], 3)
    assert 1 <= report["mean_batch"] <= 4
    assert report["single_session_ms"]["p50"] <= report["single_session_ms"]["p99"]
    assert report["payload_bytes"]["draft"] > 20
    assert report["long_context"]["committed"] == 100
