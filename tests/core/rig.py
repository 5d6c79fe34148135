"""A verifier with a toy engine, and edges on wires that can be delayed and cut. No clock, no sockets."""

from __future__ import annotations

from collections import deque

from toy import EOS, N_VOCAB, ToyEngine
from wisp.core.errors import EngineError
from wisp.core.protocol.messages import (
    Message,
    Refused,
    ServerMessage,
    Verdict,
    decode_edge_message,
    decode_server_message,
    encode,
)
from wisp.core.protocol.sampling import Sampling
from wisp.core.verify.admission import Admission, KeyLimits
from wisp.core.verify.batching import batching_policy
from wisp.core.verify.cost import Coefficients, CostModel
from wisp.core.verify.events import (
    EdgeLost,
    Ended,
    InEvent,
    Limits,
    Received,
    Run,
    Send,
    StepDone,
    Tick,
    WakeAt,
)
from wisp.core.verify.verifier import Verifier
from wisp.engines.in_order import OneAtATime

SAMPLING = Sampling(seed=3)


class Rig:
    """`receive` hands the verifier a message, `step` runs its next step, `sent` collects its messages."""

    def __init__(
        self,
        *,
        slots: int = 3,
        slot_tokens: int = 64,
        kv_tokens: int | None = None,
        step_tokens: int = 16,
        batching: str = "continuous",
        limits: dict[str, KeyLimits] | None = None,
        max_sessions: int = 100,
        slo_admission: bool = False,
        digest: str = "",
        depth: int = 1,
        history_tokens: int = 0,
        cost: Coefficients | None = None,
    ) -> None:
        self.engine = ToyEngine(slots)
        self.queue = OneAtATime(self.engine, depth)
        self.limits = Limits(
            N_VOCAB,
            frozenset({EOS}),
            slots,
            slot_tokens,
            kv_tokens or slots * slot_tokens,
            step_tokens,
            max_draft=8,
            slo_admission=slo_admission,
            digest=digest,
            depth=depth,
            history_tokens=history_tokens,
        )
        self.verifier = Verifier(
            self.limits, batching_policy(batching), Admission(max_sessions, limits), CostModel(cost)
        )
        self.now = 0.0
        self.sent: dict[int, deque[ServerMessage]] = {}
        self.host_ms = 1e3 if depth > 1 else 0.0  # so much that the next step is planned at once
        self.flying: deque[Run] = deque()  # steps that were dispatched, oldest first
        self.wake_at: float | None = None
        self.lost = 0  # messages on connections that broke
        self.log: list[tuple[float, InEvent]] = []
        self.runs: list[Run] = []
        self.ended: list[Ended] = []

    def feed(self, event: InEvent) -> None:
        self.log.append((self.now, event))
        for action in self.verifier.handle(self.now, event):
            if isinstance(action, Send):
                message = decode_server_message(encode(action.message))
                self.sent.setdefault(action.connection, deque()).append(message)
            elif isinstance(action, Run):
                self.flying.append(action)
                assert len(self.flying) <= self.limits.depth, "more steps than fit"
                self.queue.submit(action)
                self.runs.append(action)
            elif isinstance(action, WakeAt):
                self.wake_at = action.at
            else:
                self.ended.append(action)

    def receive(self, message: Message, connection: int = 1, key: str = "") -> None:
        decoded = decode_edge_message(encode(message))
        assert not hasattr(decoded, "version")
        self.feed(Received(connection, key, decoded))

    def lose(self, connection: int = 1) -> None:
        self.feed(EdgeLost(connection))
        self.lost += len(self.sent.pop(connection, ()))

    @property
    def run(self) -> Run | None:
        """The oldest step that was dispatched."""
        return self.flying[0] if self.flying else None

    def dispatch(self) -> bool:
        """Let the verifier start steps, as many as fit. False if there is nothing to run."""
        before = -1
        while before < len(self.flying) < self.limits.depth:
            before = len(self.flying)
            self.feed(Tick())
        return bool(self.flying)

    def finish(self) -> None:
        """Run the oldest step that was dispatched."""
        run = self.flying.popleft()
        try:
            results = self.queue.collect().results
        except EngineError as error:
            self.feed(StepDone([], 1.0, str(error), run.step))
            return
        self.now += 0.01
        self.feed(StepDone(results, 10.0, "", run.step, self.host_ms))

    def steps(self, n: int) -> None:
        """Run `n` steps, one after another."""
        for _ in range(n):
            assert self.dispatch(), "nothing to run"
            self.finish()

    def fail(self, error: str) -> None:
        """The step that was dispatched fails as a whole."""
        self.engine.failure = error
        self.finish()

    def settle(self, steps: int = 200) -> None:
        """Run until there is nothing left to run."""
        for _ in range(steps):
            if not self.dispatch():
                return
            self.finish()
        raise AssertionError("still busy")

    def take(self, connection: int = 1) -> ServerMessage:
        return self.sent[connection].popleft()

    def verdict(self, connection: int = 1) -> Verdict:
        message = self.take(connection)
        assert isinstance(message, Verdict), message
        return message

    def refused(self, connection: int = 1) -> Refused:
        message = self.take(connection)
        assert isinstance(message, Refused), message
        return message

    def verdicts(self, connection: int = 1) -> list[Verdict]:
        """All that is on its way there, which must be verdicts alone."""
        found = [m for m in self.sent[connection] if isinstance(m, Verdict)]
        assert len(found) == len(self.sent[connection]), self.sent[connection]
        return found

    def text(self, connection: int = 1) -> list[int]:
        """The tokens of those verdicts."""
        return [t for v in self.verdicts(connection) for t in v.tokens]

    @property
    def silent(self) -> bool:
        return not any(self.sent.values())
