"""The oracles: conditions that must hold after every event of a verifier, at every token of a user, and at the end.

text        each token is the target's own after all before it; a user's text is a prefix of the target's, once each
whose       nothing of a session goes to another key, and no KV is shared between keys or salts
books       KV, slots, places, shares and metrics add up
liveness    a request ends with its text, or with an error for which a fault was there
memory      once everybody has gone, nothing is left
"""

from __future__ import annotations

from collections import Counter, deque
from typing import TYPE_CHECKING

from wisp.check.faults.engine import Text, begun, edit_afresh, read, says
from wisp.core.errors import EngineDeadError, RequestError
from wisp.core.protocol.messages import Open, Refused, Verdict
from wisp.core.protocol.step import Committed
from wisp.core.verify.events import Action, EdgeLost, InEvent, Received, Run, Send, StepDone
from wisp.core.verify.kv import Sharers
from wisp.core.verify.session import Session
from wisp.core.verify.states import IN_ENGINE, PARKED, READY, WAITING
from wisp.core.verify.verifier import Verifier

if TYPE_CHECKING:
    from wisp.check.faults.nodes import VerifierProcess
    from wisp.check.faults.world import World

_LOSSES = {
    "kill",
    "vanish",
    "freeze",
    "stop",
    "hang",
    "dead",
    "operate",
    "cut",
    "drain_line",
    "stall",
    "part",
}
# An error that a user may be given, and the faults of which one must have been there (none: at any time).
EXCUSES: dict[str, set[str]] = {
    "model_changed": {"swap"},
    "logits_not_finite": {"nan"},
    "engine_error": {"step", "slice", "dead"},
    "verifiers_lost": _LOSSES,
    "verifier_unavailable": _LOSSES | {"proxy", "old_server", "swap", "slow"},
    "verifier_unauthorized": {"revoke"},
    "version_mismatch": {"old_server"},
    "overloaded": set(),  # the system is small
    "rate_limit_exceeded": set(),
    "shutting_down": {"stop", "operate", "hang", "dead", "swap"},
    "forbidden": {"hostile"},  # one that knows the name of a session
    "unknown_session": _LOSSES | {"hostile"},
}


class Violation(Exception):
    """Something that must be true was not."""


class _Watched:
    """What is remembered of a session at a verifier."""

    __slots__ = ("known", "session", "state")

    def __init__(self, session: Session, salt: int) -> None:
        self.session = session
        self.known = 0  # tokens of its chain that were looked at
        self.state = begun(salt)


class VerifierWatch:
    """Looks at one verifier after each event."""

    def __init__(self, world: World, process: VerifierProcess) -> None:
        host = process.host
        assert host is not None
        self.world = world
        self.process = process
        self.host = host
        self.verifier: Verifier = host.verifier
        self._handle = self.verifier.handle
        self._watched: dict[int, _Watched] = {}
        self._content: dict[int, Sharers] = {}  # whose tokens a slot holds
        self._steps: deque[dict[int, Session]] = deque()  # in flight, oldest first
        self._fed: deque[int] = deque()  # the tokens of each
        self._openings: dict[int, int] = {}  # round of the last Open, by session
        self.committed: Counter[str] = Counter()  # tokens, by key
        self.verifier.handle = self.handle  # type: ignore[method-assign]

    def handle(self, now: float, event: InEvent) -> list[Action]:
        """In place of the verifier's own."""
        v = self.verifier
        self.world.events += 1
        back = self._back(event) if isinstance(event, StepDone) else {}
        before = {h: (s, s.n_committed) for h, s in back.items()}
        self._note(event)
        evicted = v.evicted
        actions = self._handle(now, event)
        self.world.seen["KV taken for others"] += v.evicted - evicted
        for s, n in before.values():
            self.committed[s.key] += s.n_committed - n
        opening = event.message if isinstance(event, Received) and isinstance(event.message, Open) else None
        self._check_texts(opening.session if opening is not None else "")
        ended = [s for s, _ in before.values()]
        for action in actions:
            if isinstance(action, Send):
                self._check_sent(action.connection, action.message, ended)
            elif isinstance(action, Run):
                self._check_run(action)
        if opening is not None and v.knows(opening.session) and not _refused(opening.session, actions):
            self._openings[v._by_id[opening.session].handle] = opening.round
        self._check_books()
        return actions

    def _back(self, done: StepDone) -> dict[int, Session]:
        """The sessions of the step that is back. What is in flight after a step that failed is lost with it."""
        if not self._steps or done.step not in (-1, self.verifier.in_flight.steps[0].number):
            return {}  # lost before
        back = self._steps.popleft()
        self._fed.popleft()
        if done.error:
            self.world.seen["steps lost with another"] += len(self._steps)
            self._steps.clear()
            self._fed.clear()
        return back

    @property
    def _in_flight(self) -> set[int]:
        return set().union(*self._steps)

    def _note(self, event: InEvent) -> None:
        """Count the situations that a run is to bring about."""
        seen, v = self.world.seen, self.verifier
        if isinstance(event, Received) and isinstance(event.message, Open):
            keys = self.process.keys
            # A router vouches for its thin clients
            own = event.connection in self.host._sockets and not keys.router
            if own and event.key not in keys.limits:
                self.fail(f"an Open of the key {event.key}, which was revoked")
            s = v._by_id.get(event.message.session)
            if s is not None and s.key == event.key:
                seen["session resumed"] += 1
                seen["session resumed in a step"] += s.state in IN_ENGINE
                ahead = len(event.message.committed) > s.n_committed
                seen["edge knows more"] += ahead
                seen["edge knows more in a step"] += ahead and s.state in IN_ENGINE
            elif event.message.committed:
                seen["session from elsewhere"] += 1
        elif isinstance(event, StepDone):
            seen["step failed"] += bool(event.error)
            seen["slice failed"] += any(r.error for r in event.results)
        elif isinstance(event, EdgeLost):
            held = v._by_connection.get(event.connection, ())
            seen["connection lost in a step"] += any(h in step for step in self._steps for h in held)

    def fail(self, what: str) -> None:
        raise self.world.violated(f"{self.process.name}: {what}")

    # --- text

    def _check_texts(self, opened: str) -> None:
        watched, sessions = self._watched, self.verifier.sessions
        if len(watched) > len(sessions) + 8:
            for handle in [h for h in watched if h not in sessions]:
                self._look(watched.pop(handle), "")
            self._openings = {h: round_ for h, round_ in self._openings.items() if h in sessions}
        for handle, s in sessions.items():
            w = watched.get(handle)
            if w is None:
                w = watched[handle] = _Watched(s, self.process.salt)
            if w.known != len(s.progress.chain):
                self._look(w, opened)

    def _look(self, w: _Watched, opened: str) -> None:
        """At the tokens that are new."""
        s = w.session
        chain, n_prompt, sampling = s.progress.chain, s.progress.n_prompt, s.params.sampling
        lies = s.id in self.world.liars
        if len(chain) < w.known:
            self.fail(f"session {s.id} has lost tokens")
        if s.n_committed > s.params.max_tokens:
            self.fail(f"session {s.id} has {s.n_committed} of {s.params.max_tokens} tokens")
        for at in range(w.known, len(chain)):
            token = chain[at]
            if at >= n_prompt and not (lies and s.id == opened):
                position = at - n_prompt
                edit = edit_afresh(chain[:at], sampling, position)
                own = says(w.state, sampling, position, edit)
                if token != own:
                    self.fail(f"session {s.id} has {token} at {position}, and the target says {own}")
            w.state = read(w.state, token)
        w.known = len(chain)

    # --- whose

    def _check_sent(self, connection: int, message: Verdict | Refused, ended: list[Session]) -> None:
        if isinstance(message, Refused):
            self.world.seen[f"refused: {message.code}"] += 1
            for over in ended:
                opened = self._openings.get(over.handle, message.round)
                if over.id == message.session and message.fatal and message.round < opened:
                    self.fail(f"session {over.id} ends with a refusal of a round before its Open")
            return
        found = (s for s in ended if s.id == message.session)
        s = self.verifier._by_id.get(message.session) or next(found, None)
        key = self.host._keys.get(connection)
        if s is None:
            self.fail(f"a verdict on session {message.session}, which is not there")
            return
        if key is not None and key != s.key:
            self.fail(f"a verdict on session {s.id} of {s.key} goes to {key}")
        n = message.base + len(message.tokens)
        if message.tokens != s.progress.tokens_from(message.base)[: len(message.tokens)] or n > s.n_committed:
            self.fail(f"a verdict on session {s.id} is not what was committed")
        if message.accepted > len(message.tokens):
            self.fail(f"a verdict accepts {message.accepted} of {len(message.tokens)} tokens")
        if message.logprobs and [e.token for e in message.logprobs] != message.tokens:
            self.fail(f"log probabilities of session {s.id} belong to other tokens")

    def _check_run(self, run: Run) -> None:
        v, content = self.verifier, self._content
        if len(self._steps) >= v.limits.depth:
            self.fail(f"{len(self._steps) + 1} steps at once")
        step: dict[int, Session] = {}
        seen = self.world.seen
        seen["prefix copied"] += len(run.copies)
        seen["step of many"] += len(run.slices) > 1
        seen["prompt in pieces"] += any(not s.sample for s in run.slices)
        seen["token not known yet"] += any(s.after >= 0 for s in run.slices)
        seen["draft verified"] += any(s.n_draft for s in run.slices)
        for c in run.copies:
            content[c.target] = content[c.source]
        slots = set()
        for work in run.slices:
            s = v.sessions[work.session]
            seen["own draft verified"] += work.n_draft > 0 and s.flight.own is not None
            seen["prefix reused"] += bool(s.progress.reused) and not s.round.heard
            if work.start and content.get(work.slot) != s.params.sharers:
                self.fail(f"KV of {content.get(work.slot)} is used for {s.params.sharers}")
            content[work.slot] = s.params.sharers
            slots.add(work.slot)
            step[work.session] = s
        if len(slots) != len(run.slices) or len(step) != len(run.slices):
            self.fail("a step has two slices of one slot or session")
        self._steps.append(step)
        self._fed.append(sum(len(s.tokens) for s in run.slices))
        fed = sum(self._fed)
        if v.kv.held + fed > v.kv.kv_tokens:
            self.fail(f"{fed} tokens in flight for {v.kv.kv_tokens - v.kv.held} of free KV")

    # --- books

    def _check_books(self) -> None:
        v, in_flight = self.verifier, self._in_flight
        kv, index = v.kv, v.index
        if sum([len(slot.tokens) for slot in kv.slots]) != kv.held or not 0 <= kv.held <= kv.kv_tokens:
            self.fail(f"slots hold other than {kv.held} of {kv.kv_tokens} tokens")
        owners = {slot.owner: slot for slot in kv.slots if slot.owner is not None}
        if len(owners) != kv.owned_slots:
            self.fail(f"{len(owners)} slots have an owner, and {kv.owned_slots} are said to")
        places: Counter[str] = Counter()
        with_slot = 0
        for handle, s in v.sessions.items():
            if s.has_place:
                places[s.key] += 1
                if v._by_id.get(s.id) is not s:
                    self.fail(f"session {s.id} has a place, but not its name")
            if s.slot is not None:
                with_slot += 1
                slot = owners.get(handle)
                if slot is None or slot.index != s.slot:
                    self.fail(f"session {s.id} does not own its slot {s.slot}")
                elif len(slot.tokens) != s.cached or slot.tokens != s.progress.chain[: s.cached]:
                    self.fail(f"slot {s.slot} does not hold what session {s.id} has cached")
            elif s.cached:
                self.fail(f"session {s.id} has {s.cached} tokens cached, and no slot")
            state = s.state
            if (state in IN_ENGINE) != (handle in in_flight):
                self.fail(f"session {s.id} is {state.name}, and the steps in flight say otherwise")
            if state is READY and handle not in index.ready:
                self.fail(f"session {s.id} is ready, and nobody knows")
            if state is PARKED and (handle not in index.parked or s.connection >= 0):
                self.fail(f"session {s.id} is parked, and nobody knows")
            if state is WAITING and s.connection < 0:
                self.fail(f"session {s.id} waits for an edge that is gone")
            if s.connection >= 0 and handle not in v._by_connection.get(s.connection, ()):
                self.fail(f"session {s.id} would not hear of the loss of its connection")
        if any(s.state is not PARKED for s in index.parked.values()):
            self.fail("a session that is not parked will expire")
        if any(s.state is not READY for s in index.ready.values()):
            self.fail("a session that is not ready may be picked")
        demand = v.slo_admission._demand
        if demand is not None and len(demand._shares) > len(v.sessions):
            self.fail(
                f"{len(demand._shares)} sessions are expected to need steps, and there are {len(v.sessions)}"
            )
        if with_slot != len(owners):
            self.fail(f"{len(owners)} slots are owned by {with_slot} sessions")
        usage = v.admission.usage
        total = 0
        for key, u in usage.items():
            total += u.sessions
            if u.sessions != places[key]:
                self.fail(f"{key} has {places[key]} places, and {u.sessions} are counted")
            if u.output_tokens != self.committed[key]:
                self.fail(f"{key} was given {self.committed[key]} tokens, and {u.output_tokens} are counted")
        if total != v.admission._open or len(v._by_id) != total or total > v.admission.max_sessions:
            self.fail(f"{len(v._by_id)} sessions are open, and {v.admission._open} are counted")
        gone = sum(not s.has_place for s in v.sessions.values())
        if len(index.ready) + len(index.drafting) + len(index.parked) > len(v.sessions) or gone > len(
            in_flight
        ):
            self.fail("an ended session is still there")

    # --- the end

    def left_behind(self) -> list[str]:
        """What is there that should not be, once everybody has gone and parking is over."""
        v, host = self.verifier, self.host
        counts = {
            "sessions": len(v.sessions),
            "names": len(v._by_id),
            "connections of sessions": sum(map(len, v._by_connection.values())),
            "slots": v.kv.owned_slots,
            "senders": len(host._senders),
            "keys": len(host._keys),
            "sockets": len(host._sockets),
            "sessions in metrics": len(host.metrics._seen),
            "Opens that wait for a grammar": sum(map(len, host._compiling._waiting.values())),
            "sockets in the crowd": len(self.process.crowd._inside),
            "sessions in the page": len(host.recorder._lives),
        }
        return [f"{self.process.name}: {n} {what}" for what, n in counts.items() if n]


def _refused(session: str, actions: list[Action]) -> bool:
    messages = [action.message for action in actions if isinstance(action, Send)]
    return any(isinstance(m, Refused) and m.session == session for m in messages)


class AskWatch:
    """Looks at what a user is given."""

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name = world, name
        self.text: Text | None = None
        self.given = 0
        self.finish = ""
        self.began = world.loop.now

    def told(self, committed: Committed) -> None:
        tokens, n = committed.tokens, self.given
        assert self.text is not None
        own = self.text.upto(n + len(tokens))
        if self.finish:
            raise self.world.violated(f"{self.name} was given more after its end")
        if own[n : n + len(tokens)] != tokens:
            said = own[n : n + len(tokens)]
            raise self.world.violated(f"{self.name} was given {tokens} at {n}, and the target says {said}")
        self.given += len(tokens)
        if committed.finish:
            self.finish = committed.finish
            if not self.text.whole or len(own) != self.given or self.text.finish != committed.finish:
                raise self.world.violated(
                    f"{self.name} ended by {committed.finish} after {self.given} tokens"
                )
        elif self.text.whole and self.given == len(own):
            raise self.world.violated(f"{self.name} was given all of its text, and no end")
        if committed.logprobs and [e.token for e in committed.logprobs] != tokens:
            raise self.world.violated(f"{self.name} was given log probabilities of other tokens")
        if not 0 <= committed.accepted <= max(committed.drafted, 0) or committed.from_draft > len(tokens):
            raise self.world.violated(
                f"{self.name} was told of {committed.accepted} accepted of {committed.drafted}"
            )

    def failed(self, error: RequestError) -> None:
        shape = self.world.shape
        if error.code == "verifier_unavailable" and shape.sockets < len(shape.edges):
            return  # others may have all connections
        excuses = EXCUSES.get(error.code)
        if error.code == "shutting_down" and shape.replicas:
            excuses = excuses and excuses | {"kill", "vanish"}  # replicas end with their router
        if excuses is None or (excuses and excuses.isdisjoint(self.world.happened)):
            raise self.world.violated(f"{self.name} failed for no reason: {error.code}: {error}")


class Oracles:
    """All of them for one world."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.watches: list[VerifierWatch] = []

    def verifier_up(self, process: VerifierProcess) -> None:
        self.watches.append(VerifierWatch(self._world, process))

    def verifier_failed(self, process: VerifierProcess, error: Exception) -> None:
        """Its end must have been meant."""
        if not isinstance(error, EngineDeadError):
            raise self._world.violated(f"{process.name} failed: {error!r}")
