"""An event log of a live run replays: the same events give the same steps and the same messages."""

from __future__ import annotations

from collections import deque
from concurrent.futures import ThreadPoolExecutor

import pytest

from harness import Fleet, Peer, opening
from waiting import eventually
from wisp.core.protocol.messages import Cancel, Draft, Refused, Verdict
from wisp.core.protocol.sampling import Sampling
from wisp.core.verify.admission import KeyLimits
from wisp.core.verify.events import Received, Run, Send, StepDone
from wisp.engines.null import NullTarget, null_token
from wisp.server.event_log import read_runs

pytestmark = [pytest.mark.slow, pytest.mark.modelless]


@pytest.mark.parametrize("depth", [1, 2])
def test_the_event_log_of_a_live_run_replays_to_the_same_actions(fleet: Fleet, depth: int) -> None:
    path = fleet.folder / "events.log"
    options = ("--event-log", str(path), "--max-sessions", "50", "--depth", str(depth))
    server = fleet.serve(*options, target="null", engine="null")

    def talk(n: int) -> list[Verdict]:
        """One edge with three sessions in turn; the last is left open, the connection just goes."""
        heard = []
        with Peer(server.url) as peer:
            for session in (f"session-{n}-{i}" for i in range(3)):
                truth = [null_token(n, position) for position in range(40)]
                heard.append(peer.open(session, sampling=Sampling(seed=n), max_tokens=40))
                for round_ in range(1, 6):
                    known = heard[-1].base + len(heard[-1].tokens)
                    peer.say(Draft(session, round_, known, [*truth[known : known + round_], 0]))
                    heard.append(peer.verdict())
                if session[-1] == "1":
                    peer.say(Cancel(session))
        return heard

    with ThreadPoolExecutor(6) as pool:
        heard = list(pool.map(talk, range(6)))
    server.terminate()
    assert server.wait() == 0

    [(header, events)] = read_runs(path)
    assert (header.policy, header.max_sessions, header.engine) == ("wisp", 50, "null")
    verifier = header.verifier()
    queue = NullTarget(slots=256).queue(depth)
    flying: deque[Run] = deque()
    sent: dict[int, list[Verdict]] = {}
    steps = 0
    for now, event in events:
        if isinstance(event, StepDone):
            assert flying, "a step ended that the replay has not begun"
            assert flying.popleft().step == event.step
            assert queue.collect().results == event.results  # the same step gives what it gave then
            steps += 1
        for action in verifier.handle(now, event):
            if isinstance(action, Run):
                flying.append(action)
                queue.submit(action)
                assert len(flying) <= depth
            elif isinstance(action, Send):
                assert isinstance(action.message, Verdict)
                sent.setdefault(action.connection, []).append(action.message)
    assert not flying
    assert steps > 6
    assert sum(isinstance(event, Received) for _, event in events) == 6 * (3 * 6 + 1)
    by_session = {messages[0].session: messages for messages in sent.values()}
    assert [by_session[f"session-{n}-0"] for n in range(6)] == heard  # every message, times and all
    path.write_bytes(path.read_bytes()[:-1])  # as a crash leaves it
    assert read_runs(path) == [(header, events[:-1])]


def test_limits_that_change_during_a_run_are_replayed(fleet: Fleet) -> None:
    path, keys = fleet.folder / "events.log", fleet.folder / "keys.toml"
    key = '[keys.alice]\nsecret = "a"\n'
    keys.write_text(key)
    flags = ("--event-log", str(path), "--api-keys", str(keys))
    server = fleet.serve(*flags, target="null", engine="null")
    with Peer(server.url, key="a") as peer:
        peer.open("session-1")
        keys.write_text(key + "requests_per_minute = 1\n")
        eventually(lambda: "read again" in server.log())
        peer.open("session-2")
        peer.say(opening("session-3"))
        refused = peer.refused()
    server.terminate()
    assert server.wait() == 0
    [(header, events)] = read_runs(path)
    assert header.key_limits == {"alice": KeyLimits()}
    verifier = header.verifier()
    sent = [a.message for now, event in events for a in verifier.handle(now, event) if isinstance(a, Send)]
    assert [m for m in sent if isinstance(m, Refused)] == [refused]
    assert verifier.admission.usage["alice"].requests == 2
