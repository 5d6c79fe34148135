"""The edge side: devices with a connection that breaks, and sessions that draft, meddle and keep the text.

`ChaosSession` drives a `Drafter` as `wisp.edge.backend` does, one drafted token at a time. Between the drafter's frames
it sends others: duplicates, early drafts, drafts that restate committed tokens or tokens in flight, stale and invalid
ones. So rounds on the wire are numbered apart from the drafter's.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import msgspec

from wisp.api.text import TextStream
from wisp.check.lossless.judge import Case, Outcome
from wisp.check.lossless.world import Chaos, ChaosServer
from wisp.core.draft.drafter import Drafter
from wisp.core.draft.policies import Ahead
from wisp.core.draft.signals import Signal
from wisp.core.draft.task import Action, Phase, Reopen, Task
from wisp.core.errors import ProtocolError, RequestError
from wisp.core.protocol.messages import (
    MAX_BRANCHES,
    MAX_DRAFT,
    Cancel,
    Draft,
    Message,
    Open,
    Refused,
    Verdict,
    decode_server_message,
    encode,
)
from wisp.core.protocol.step import Committed
from wisp.engines.base import DraftEngine, Proposal
from wisp.engines.build import drafting_policies
from wisp.sim.timeline import Timeline

PROVOKED = frozenset({"out_of_turn", "out_of_vocabulary", "oversized"})  # refusals of the frames that meddle


class ChaosLink:
    """One device: a connection, first in first out both ways, with delays."""

    def __init__(
        self, clock: Timeline, server: ChaosServer, key: str, rng: random.Random, counts: Counter[str]
    ) -> None:
        self.clock, self.server, self.key, self.rng, self.counts = clock, server, key, rng, counts
        self.connection = 0  # 0: down
        self.sessions: dict[str, ChaosSession] = {}
        self._open_at_server: set[int] = set()  # connections that the verifier still reads from
        self._free = [0.0, 0.0]  # when the last frame sent arrives: up, down

    def connect(self, connection: int) -> None:
        self.connection = connection
        self._open_at_server.add(connection)
        self._free = [0.0, 0.0]
        for session in list(self.sessions.values()):
            session.connect()

    def send(self, message: Message) -> None:
        connection, server, frame = self.connection, self.server, encode(message)
        if connection:
            self._in_order(0, lambda: self._arrive(connection, server, frame))

    def receive(self, connection: int, frame: bytes) -> None:
        """A frame left the verifier for `connection`; it arrives later, or never."""
        if connection == self.connection:
            self._in_order(1, lambda: self._hear(connection, frame))

    def cut(self, *, at_server: bool) -> None:
        """The connection breaks. The verifier notices later, perhaps after we have come back, and may
        until then still read what was under way (`at_server` False: all of that is lost, and it knows)."""
        connection, server, self.connection = self.connection, self.server, 0
        if not at_server or self.rng.random() < 0.5:
            self._open_at_server.discard(connection)
        if at_server:
            self.clock.after(self.rng.choice((0.0, 0.02, 0.3)), lambda: self._noticed(connection, server))
        for session in self.sessions.values():
            session.lost()

    def _noticed(self, connection: int, server: ChaosServer) -> None:
        self._open_at_server.discard(connection)
        server.lost(connection)

    def _arrive(self, connection: int, server: ChaosServer, frame: bytes) -> None:
        if connection in self._open_at_server:
            server.receive(connection, self.key, frame)

    def _hear(self, connection: int, frame: bytes) -> None:
        if connection != self.connection:
            return
        message = decode_server_message(frame)
        assert isinstance(message, Verdict | Refused)
        session = self.sessions.get(message.session)
        if session is not None:
            session.hear(message)

    def _in_order(self, way: int, what: Callable[[], None]) -> None:
        delay = self.rng.choice((0.001, 0.005, 0.02, 0.06))
        self._free[way] = max(self._free[way], self.clock.now + delay)
        self.clock.at(self._free[way], what)


class _Sent(msgspec.Struct, frozen=True):
    """A frame with a draft. `shift`: committed tokens that it restates before the drafter's own."""

    round: int  # the drafter's, -1 if it does not know of this frame
    base: int
    tokens: list[int]
    shift: int
    drafted: int

    def again(self, message: Draft) -> bool:
        """Is it in this frame?"""
        own = message.tokens
        same = self.round == message.round and self.base == message.base and not self.shift
        return same and self.tokens[: len(own)] == own


class ChaosSession:
    """One session of one case."""

    def __init__(
        self,
        session: str,
        case: Case,
        link: ChaosLink,
        engine: DraftEngine | None,
        eos: frozenset[int],
        piece: Callable[[int], bytes],
        chaos: Chaos,
        ended: Callable[[ChaosSession, Outcome], None],
    ) -> None:
        self.id, self.case, self.link, self.engine = session, case, link, engine
        self.clock, self.rng, self.counts = link.clock, link.rng, link.counts
        self.chaos, self.ended = chaos, ended
        policies = drafting_policies(case.drafting or "fixed")
        policy = policies.make(case.sampling.temperature) if engine is not None else None
        ahead = Ahead(energy=0.02) if case.number % 2 else None
        task = Task(case.prompt, case.sampling, case.max_tokens, case.ignore_eos, case.logprobs, case.slo)
        self.drafter = Drafter(session, task, policy, eos, ahead=ahead if engine is not None else None)
        self.stream = TextStream(piece, case.stop)
        self.tokens: list[int] = []
        self._reasoning = _reasoning(case)
        self.over = False
        self.cancelled = False
        self._wire = -1
        self._sent: dict[int, _Sent] = {}
        self._last: Draft | None = None
        self._thinking = False
        link.sessions[session] = self

    # --- the drafter's events

    def connect(self) -> None:
        if not self.over and self.drafter.phase is not Phase.DONE:
            self._carry_out(self.drafter.connected(self._now_ms, MAX_DRAFT, "", MAX_BRANCHES))

    @property
    def _now_ms(self) -> float:
        return self.clock.now * 1e3

    def lost(self) -> None:
        self.drafter.lost()

    def cancel(self) -> None:
        self.link.send(Cancel(self.id))
        self.counts["cancelled"] += 1
        self._end("", whole=False)

    def hear(self, message: Verdict | Refused) -> None:
        try:
            if isinstance(message, Verdict):
                self._count(message)
                self._carry_out(self.drafter.verdict(self._now_ms, self._translated(message)))
            elif message.code in PROVOKED:
                self.counts["refused_frames"] += 1
            else:
                self._carry_out(self.drafter.refused(message))
        except (ProtocolError, RequestError) as error:
            self._end("", problem=str(error))

    def _carry_out(self, actions: list[Action]) -> None:
        for action in actions:
            if self.over:
                return
            if isinstance(action, Committed):
                self._take(action)
            elif isinstance(action, Reopen):
                self.counts["reopened"] += 1
                self.clock.after(action.after_s, self._reopen)
            else:
                self._send(action)
        if self.drafter.phase is Phase.SERVED and self.rng.random() < self.chaos.meddle:
            n = len(self.drafter.committed)
            self._extra(self.case.script[n : n + self.rng.randint(1, 6)], round_=-1)
        self._think()

    def _reopen(self) -> None:
        if self.link.connection and self.drafter.phase is Phase.DETACHED:
            self.connect()

    def _take(self, item: Committed) -> None:
        if item.logprobs and [e.token for e in item.logprobs] != item.tokens:
            self._end("", problem="log probabilities do not belong to the tokens")
            return
        first, last = len(self.tokens), len(self.tokens) + item.from_draft
        self.counts["reasoning_ended_inside_draft"] += first < self._reasoning < last
        for i, token in enumerate(item.tokens):
            self.tokens.append(token)
            if self.stream.push(token):
                self.counts["stop_inside_draft"] += i < item.from_draft and i + 1 < len(item.tokens)
                self.link.send(Cancel(self.id))
                self._end("stop")
                return
        if item.finish:
            self._end(item.finish)

    def _end(self, finish: str, *, whole: bool = True, problem: str = "") -> None:
        self.over = True
        self.counts["branches_sent"] += self.drafter.branches.sent
        self.counts["branches_taken"] += self.drafter.branches.taken
        self.link.sessions.pop(self.id, None)
        if self.engine is not None:
            self.engine.forget(self.id)
        self.stream.end()
        self.ended(self, Outcome(self.tokens, finish, self.stream.take(), whole, problem))

    # --- drafting

    def _think(self) -> None:
        if self.drafter.wants_token(self._now_ms) and not self._thinking and not self.over:
            self._thinking = True
            delay = self.rng.uniform(0.001, 0.02)
            if self.rng.random() < self.chaos.silence:
                self.counts["silences"] += 1
                delay += self.rng.uniform(1.0, 6.0)
            self.clock.after(delay, self._propose)

    def _propose(self) -> None:
        self._thinking = False
        if self.over or not self.drafter.wants_token(self._now_ms):
            return
        p = self._proposal(self.drafter.context(), self.drafter.position)
        if p is None:
            actions = self.drafter.proposed(self._now_ms, None, Signal(), 10.0)
        else:
            self.counts["certain_tokens"] += p.signal.certain + len(p.then)
            actions = self.drafter.proposed(self._now_ms, p.token, p.signal, 10.0, p.then, p.other)
        drafting = self.drafter.phase is Phase.DRAFTING
        if drafting and not actions and self.rng.random() < self.chaos.meddle:
            self._extra(self.drafter.chain.tokens, round_=-1)  # sent before it is complete
        self._carry_out(actions)

    def _proposal(self, context: list[int], position: int) -> Proposal | None:
        assert self.engine is not None
        return self.engine.propose(self.id, context, position, self.case.sampling)

    # --- sending

    def _send(self, message: Open | Draft) -> None:
        """The drafter's own frame, whose draft may be longer than the drafter's."""
        is_open = isinstance(message, Open)
        own = message.draft if isinstance(message, Open) else message.tokens
        base = len(self.drafter.committed)
        last = self._sent.get(self._wire)
        if isinstance(message, Draft) and last is not None and last.again(message):
            # Once more, with branches: under the number and with the tokens that it had on the wire.
            self._last = message = msgspec.structs.replace(message, round=self._wire, tokens=last.tokens)
            self.link.send(message)
            return
        draft = own + self._beyond(base, own)
        if is_open and not own and not base and self.engine and self.rng.random() < self.chaos.ride:
            draft = self._first_draft()
        self._wire += 1
        self._sent[self._wire] = _Sent(message.round, base, draft, 0, len(own))
        if isinstance(message, Open):
            message = msgspec.structs.replace(message, round=self._wire, draft=draft)
            self._last = Draft(self.id, self._wire, base, draft)
        else:
            self._last = message = msgspec.structs.replace(message, round=self._wire, tokens=draft)
        self.counts["drafts"] += bool(draft)
        self.link.send(message)
        if self.rng.random() < self.chaos.meddle:
            self._meddle(message)

    def _first_draft(self) -> list[int]:
        draft: list[int] = []
        while len(draft) < min(self.rng.randint(1, 6), self.case.max_tokens):
            proposal = self._proposal(self.case.prompt + draft, len(draft))
            if proposal is None:
                break
            draft.append(proposal.token)
        self.counts["first_drafts"] += bool(draft)
        return draft

    def _beyond(self, base: int, own: list[int]) -> list[int]:
        """The reference's tokens after `own`, where `own` is the reference's too: these will be accepted, up
        to where the session ends. After an end of sequence anything may follow."""
        script, end = self.case.script, base + len(own)
        likely = self.case.drafter == "oracle" or end == len(script)
        if not own or self.rng.random() >= self.chaos.overlong ** (0.1 if likely else 1.0):
            return []
        if self.drafter.committed + own != script[:end]:
            return []
        junk = [self.rng.choice(script) for _ in range(2)] if end >= len(script) - 4 else []
        return (script[end : end + 6] + junk)[: MAX_DRAFT - len(own)]

    # --- frames that the drafter does not know

    def _meddle(self, sent: Open | Draft) -> None:
        """Once a frame is out: the same again, one that overtakes it, or one that makes no sense."""
        kind = self.rng.choice(("again", "overlap", "overlap", "old", "unknown", "foreign"))
        if kind == "again" and isinstance(sent, Draft):
            self.counts["duplicates_sent"] += 1
            self.link.send(sent)
        elif kind == "overlap" and self._last is not None:
            self._overlap(self._last)
        elif kind == "old" and self._wire > 2:
            self.link.send(Draft(self.id, self.rng.randrange(self._wire), 0, [1, 2]))
        elif kind == "unknown":
            self.link.send(Draft(self.id, self._wire + 1, len(self.drafter.committed) + 100, [1]))
        elif kind == "foreign":
            self.link.send(Draft(self.id, self._wire + 1, 0, [1 << 30]))

    def _overlap(self, last: Draft) -> None:
        """Draft ahead: restate the draft in flight, and guess on. Its verdict settles the same round."""
        committed = self.drafter.committed
        guess = committed[: last.base] + last.tokens
        rest = guess[len(committed) :] if guess[: len(committed)] == committed else []
        more = self.case.script[len(committed) + len(rest) :][: self.rng.randint(0, 3)]
        wire = self._wire
        own = self._sent[wire].round
        delay = self.rng.choice((0.0, 0.01, 0.05))
        self.clock.after(delay, lambda: self._extra(rest + more, round_=own, of=wire))

    def _extra(self, draft: list[int], *, round_: int, of: int = -1) -> None:
        """A draft from an older base: the last committed tokens are said once more."""
        if self.over or not self.link.connection or (of >= 0 and of != self._wire):
            return
        committed = self.drafter.committed
        shift = min(self.rng.choice((0, 0, 1, 2, 5)), len(committed))
        base = len(committed) - shift
        tokens = (committed[base:] + draft)[:MAX_DRAFT]
        self._wire += 1
        self._sent[self._wire] = _Sent(round_, base, tokens, shift if round_ >= 0 else 0, len(draft))
        self.counts["overlapping_drafts"] += 1
        serve = self.drafter.rounds.serve
        self.link.send(Draft(self.id, self._wire, base, tokens, serve=serve))

    # --- verdicts

    def _translated(self, verdict: Verdict) -> Verdict:
        """As the drafter would have it: its own round, base and count, or a round it does not wait for."""
        sent = self._sent.get(verdict.round)
        if sent is None or sent.round < 0 or sent.base != verdict.base or len(verdict.tokens) < sent.shift:
            return msgspec.structs.replace(verdict, round=-1)
        return msgspec.structs.replace(
            verdict,
            round=sent.round,
            base=verdict.base + sent.shift,
            tokens=verdict.tokens[sent.shift :],
            accepted=min(max(0, verdict.accepted - sent.shift), sent.drafted),
            logprobs=verdict.logprobs[sent.shift :],
        )

    def _count(self, verdict: Verdict) -> None:
        sent = self._sent.get(verdict.round)
        if sent is None or sent.base != verdict.base:
            return
        self.counts["drafted"] += len(sent.tokens) - sent.shift
        self.counts["accepted"] += max(0, verdict.accepted - sent.shift)
        accepted, n = verdict.accepted, len(verdict.tokens)
        if verdict.finish == "stop":
            self.counts["eos_inside_draft"] += accepted == n < len(sent.tokens)
        elif verdict.finish == "length":
            self.counts["length_inside_draft"] += 1 <= accepted >= n - 1 and len(sent.tokens) >= n


def _reasoning(case: Case) -> int:
    """Tokens of the text before its grammar begins; -1 without one."""
    grammar = case.sampling.constraints.grammar if case.sampling.constraints is not None else None
    if grammar is None or not grammar.after:
        return -1
    after, script = list(grammar.after), case.script
    size = len(after)
    return next((i for i in range(size, len(script) + 1) if script[i - size : i] == after), -1)
