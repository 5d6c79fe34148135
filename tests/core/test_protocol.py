"""Edges and a verifier under everything that can go wrong, found by hypothesis.

Whatever the order of drafts, deliveries, cut connections, failed steps, restarts, time jumps and cancels, however few
places there are and however many steps are in flight: what an edge has committed is always a prefix of what the target
alone would say, and every session that is left alone, and was let in, ends with all of it.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from functools import partial

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from rig import Rig
from toy import EOS, N_VOCAB, edit_afresh, toy_text, toy_token
from wisp.core.draft.drafter import Drafter
from wisp.core.draft.policies import Ahead, Fixed, View
from wisp.core.draft.signals import Signal
from wisp.core.draft.task import Action, Phase, Reopen, Task
from wisp.core.errors import RequestError
from wisp.core.protocol.constraints import Constraints
from wisp.core.protocol.messages import Cancel, Message, Refused, ServerMessage, Verdict
from wisp.core.protocol.sampling import Sampling
from wisp.core.protocol.slo import Slo
from wisp.core.protocol.step import Committed

PROMPTS = [[1, 2, 3], [1, 2, 3, 4, 5, 6], [7, 7, 7], [i % 40 for i in range(25)], [i % 40 for i in range(30)]]
EOS_SET = frozenset({EOS})
CONSTRAINTS = Constraints(
    ((11, 30.0),), 1.0, 0.5, 1.2, banned=((3,), (5, 6), (11, 11)), stop_token_ids=(17,)
)  # fmt: skip
SLOS = (None, Slo(3000.0, 1000.0), Slo(200.0, 20.0))


class Fickle(Fixed):
    """A policy with random drafts that enters and leaves server mode at random."""

    def __init__(self, k: int, source: random.Random) -> None:
        super().__init__(k)
        self.random = source

    def take(self, view: View) -> int:
        return self.random.randint(0, self.k)

    def serve(self, view: View) -> bool:
        return self.random.random() < 0.2


class Edge:
    """One device with one session: a drafter, and a wire on which messages wait to be delivered."""

    def __init__(
        self, number: int, prompt: list[int], seed: int, k: int, accuracy: float, max_tokens: int
    ) -> None:
        slo = SLOS[number % len(SLOS)]
        sampling = Sampling(seed=seed, constraints=CONSTRAINTS if seed > 1 else None)
        self.task = Task(prompt, sampling, max_tokens, logprobs=0 if seed % 2 else None, slo=slo)
        self.key = "ab"[number % 2]
        self.random = random.Random(number)
        policy = Fickle(k, self.random) if k else None
        ahead = Ahead(energy=0.0) if number % 2 else None
        self.drafter = Drafter(f"session-{number}", self.task, policy, EOS_SET, ahead=ahead)
        self.accuracy = accuracy
        self.max_branches = number % 3
        self.connection: int | None = None
        self.out: deque[Message] = deque()
        self.text: list[int] = []
        self.finish = ""
        self.expected = toy_text(prompt, self.task.sampling, max_tokens)

    def act(self, actions: Sequence[Action]) -> None:
        for action in actions:
            if isinstance(action, Committed):
                self.text += action.tokens
                self.finish = action.finish
                if self.task.logprobs is not None and action.logprobs:
                    assert [e.token for e in action.logprobs] == action.tokens
                assert action.from_draft <= action.accepted <= action.drafted
            elif isinstance(action, Reopen):
                self.act(self.drafter.connected(0.0, 8, "", self.max_branches))
            else:
                self.out.append(action)

    def draft(self) -> None:
        if self.drafter.wants_token(0.0):
            context, sampling, position = self.drafter.context(), self.task.sampling, self.drafter.position
            token: int | None = toy_token(
                context, sampling, position, edit_afresh(context, sampling, position)
            )
            other = self.random.choice([None, self.random.randrange(N_VOCAB)])
            if self.random.random() > self.accuracy:
                token, other = self.random.choice([None, self.random.randrange(N_VOCAB)]), token
            signal = Signal(confidence=self.random.random())
            self.act(self.drafter.proposed(0.0, token, signal, 0.0, (), other))

    def hear(self, message: ServerMessage) -> None:
        if isinstance(message, Refused):
            try:
                self.act(self.drafter.refused(message))
            except RequestError as error:
                self.finish = "refused" if error.status == 429 and not self.text else str(error)
        else:
            assert isinstance(message, Verdict), message
            self.act(self.drafter.verdict(0.0, message))


class Fleet(RuleBasedStateMachine):
    """Small steps in any order."""

    @initialize(
        batching=st.sampled_from(["continuous", "fcfs", "wisp"]),
        slots=st.integers(1, 3),
        tight=st.booleans(),
        places=st.sampled_from([2, 100]),
        depth=st.integers(1, 3),
    )
    def start(self, batching: str, slots: int, tight: bool, places: int, depth: int) -> None:
        self.make = partial(
            Rig,
            slots=slots,
            slot_tokens=64,
            kv_tokens=70 if tight else None,
            step_tokens=8,
            batching=batching,
            max_sessions=places,
            depth=depth,
        )
        self.rig = self.make()
        self.edges: list[Edge] = []
        self.connections = 0

    @precondition(lambda self: len(self.edges) < 5)
    @rule(
        prompt=st.sampled_from(PROMPTS),
        seed=st.integers(0, 3),
        k=st.sampled_from([0, 1, 4, 8]),
        accuracy=st.sampled_from([0.0, 0.7, 1.0]),
        max_tokens=st.integers(1, 20),
    )
    def open(self, prompt: list[int], seed: int, k: int, accuracy: float, max_tokens: int) -> None:
        self.edges.append(Edge(len(self.edges), prompt, seed, k, accuracy, max_tokens))
        self.connect(len(self.edges) - 1)

    @rule(i=st.integers(0, 4))
    def connect(self, i: int) -> None:
        if i < len(self.edges) and self.edges[i].connection is None:
            edge = self.edges[i]
            self.connections += 1
            edge.connection = self.connections
            edge.act(edge.drafter.connected(0.0, 8, "", edge.max_branches))

    @rule(i=st.integers(0, 4), times=st.integers(1, 9))
    def draft(self, i: int, times: int) -> None:
        if i < len(self.edges):
            for _ in range(times):
                self.edges[i].draft()

    @rule(i=st.integers(0, 4), twice=st.booleans())
    def to_cloud(self, i: int, twice: bool) -> None:
        if i < len(self.edges) and (out := self.edges[i].out):
            connection, key = self.edges[i].connection, self.edges[i].key
            if connection is None:
                return
            message = out.popleft()
            self.rig.receive(message, connection, key)
            if twice and message.__class__.__name__ == "Draft":
                self.rig.receive(message, connection, key)

    @rule(i=st.integers(0, 4))
    def to_edge(self, i: int) -> None:
        if i < len(self.edges):
            edge = self.edges[i]
            waiting = self.rig.sent.get(edge.connection or 0)
            if waiting:
                edge.hear(waiting.popleft())

    @rule()
    def dispatch(self) -> None:
        self.rig.dispatch()

    @precondition(lambda self: self.rig.run is not None)
    @rule()
    def finish(self) -> None:
        self.rig.finish()

    @precondition(lambda self: self.rig.run is not None)
    @rule()
    def fail(self) -> None:
        """A step fails as a whole, and those that were dispatched after it with it."""
        self.rig.fail("out of memory")

    @rule(i=st.integers(0, 4), noticed=st.booleans())
    def cut(self, i: int, noticed: bool) -> None:
        """The connection breaks; what was on it is lost. The verifier may notice only much later."""
        if i < len(self.edges) and (connection := self.edges[i].connection) is not None:
            edge = self.edges[i]
            if noticed:
                self.rig.lose(connection)
            edge.connection = None
            edge.out.clear()
            edge.drafter.lost()

    @rule()
    def restart(self) -> None:
        """The verifier dies and another takes its place."""
        for i in range(len(self.edges)):
            self.cut(i, False)
        self.rig = self.make()

    @rule(seconds=st.sampled_from([0.5, 2.0, 61.0]))
    def wait(self, seconds: float) -> None:
        self.rig.now += seconds

    @rule(i=st.integers(0, 4))
    def cancel(self, i: int) -> None:
        if i < len(self.edges) and self.edges[i].connection is not None:
            edge = self.edges[i]
            edge.drafter.phase = Phase.DONE
            edge.out.append(Cancel(edge.drafter.session))
            edge.finish = "cancelled"

    @invariant()
    def text_is_the_targets(self) -> None:
        for edge in getattr(self, "edges", []):
            assert edge.text == edge.expected[: len(edge.text)]
            assert edge.text == edge.drafter.committed

    def teardown(self) -> None:
        """Without further faults every session completes."""
        if not hasattr(self, "edges"):
            return
        for _ in range(4000):
            for i, edge in enumerate(self.edges):
                self.connect(i)
                edge.draft()
                self.to_cloud(i, False)
                self.to_edge(i)
            self.rig.dispatch()
            if self.rig.run is not None:
                self.rig.finish()
            self.rig.now += 0.3
            quiet = all(e.finish and not e.out for e in self.edges) and self.rig.silent
            if quiet and self.rig.run is None:
                break
        for edge in self.edges:
            assert edge.finish, f"never ended: {edge.drafter.phase}"
            if edge.finish not in ("cancelled", "refused"):  # refused it can only be before it has begun
                assert edge.text == edge.expected
                ends = (EOS, *edge.task.sampling.stops)
                assert edge.finish == ("stop" if edge.text[-1] in ends else "length")
        for connection in range(1, self.connections + 1):  # sooner or later a ping goes unanswered
            self.rig.lose(connection)
        self.rig.now += 100.0
        self.rig.settle()
        assert not self.rig.verifier.sessions
        assert self.rig.verifier.kv.owned_slots == 0


Fleet.TestCase.settings = settings(
    max_examples=150, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck)
)
TestFleet = Fleet.TestCase
