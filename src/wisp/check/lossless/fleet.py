"""Many sessions on a few devices and two verifiers, with trouble, in virtual time."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence

from wisp.check.lossless.drafts import Drafts
from wisp.check.lossless.edge import ChaosLink, ChaosSession
from wisp.check.lossless.judge import Case, Outcome
from wisp.check.lossless.world import PARK_S, Chaos, ChaosServer
from wisp.engines.base import TargetEngine
from wisp.sim.timeline import Timeline

PATIENCE_S = 300.0  # virtual seconds in which nothing ends: sessions are stuck
KEYS = ("a", "a", "b", "a")  # of the devices; prefixes are shared within a key only

Ended = Callable[[Case, Outcome], None]


class Fleet:
    """Runs `cases`, about `at_once` of them at a time; `ended` is told of each outcome.

    A cancelled case is told of, too (`whole` False), and started again.
    """

    def __init__(
        self,
        engine: TargetEngine,
        drafts: Drafts,
        piece: Callable[[int], bytes],
        cases: Sequence[Case],
        *,
        eos: frozenset[int],
        batching: str,
        at_once: int,
        chaos: Chaos,
        seed: int,
        counts: Counter[str],
        ended: Ended,
        depth: int | None = None,
    ) -> None:
        self.rng = random.Random(seed)
        self.clock = Timeline()
        self.drafts, self.piece, self.eos = drafts, piece, eos
        self.at_once, self.chaos, self.counts, self.report = at_once, chaos, counts, ended
        self.servers = [
            ChaosServer(
                self.clock,
                engine,
                side,
                eos,
                batching,
                chaos,
                self.rng,
                counts,
                self._down_the_line,
                self._trouble,
                depth,
            )
            for side in (0, 1)
        ]
        self.links = [ChaosLink(self.clock, self.servers[0], key, self.rng, counts) for key in KEYS]
        self._waiting = list(cases)
        self._running: dict[str, ChaosSession] = {}
        self._done: set[int] = set()
        self._connections = self._names = 0
        self._progress_at = 0.0

    def run(self) -> list[str]:
        """To the end. Returns problems beside the outcomes: engine errors, sessions left behind."""
        for link in self.links:
            self._connect(link)
        self._start()
        while (self._running or self._waiting) and self.clock.now < self._progress_at + PATIENCE_S:
            if not self.clock.step():
                break
        for session in list(self._running.values()):
            self.report(
                session.case, Outcome(session.tokens, "", "", problem="stuck: nothing happens any more")
            )
        errors = [error for server in self.servers for error in server.errors]
        return [*errors, *self._left_behind()]

    # --- sessions

    def _start(self) -> None:
        while len(self._running) < self.at_once and (case := self._next_case()) is not None:
            link = self.links[self.rng.randrange(len(self.links))]
            self._names += 1
            engine = self.drafts.engine(case.drafter, case.script, self.rng)
            name = f"{self._names:08d}"
            session = ChaosSession(name, case, link, engine, self.eos, self.piece, self.chaos, self._ended)
            self._running[name] = session
            if link.connection:
                self.clock.after(self.rng.uniform(0.0, 0.05), self._opener(session))

    def _opener(self, session: ChaosSession) -> Callable[[], None]:
        connection = session.link.connection

        def open_() -> None:  # unless the link has broken: then its return opens the session
            if session.link.connection == connection:
                session.connect()

        return open_

    def _next_case(self) -> Case | None:
        """The next turn of an ended chat first: that is when its prefix is still there."""
        ready = [i for i, c in enumerate(self._waiting) if c.after < 0 or c.after in self._done]
        if not ready:
            return None
        turns = [i for i in ready if self._waiting[i].after >= 0]
        return self._waiting.pop((turns or ready)[0])

    def _ended(self, session: ChaosSession, outcome: Outcome) -> None:
        del self._running[session.id]
        self._progress_at = self.clock.now
        self.counts["sessions"] += 1
        if outcome.whole:
            self._done.add(session.case.number)
        else:
            self._waiting.insert(0, session.case)
        self.report(session.case, outcome)
        self.clock.after(self.rng.uniform(0.0, 0.02), self._start)

    def _left_behind(self) -> list[str]:
        """Once all sessions are gone, and parking is over, the verifiers must hold nothing."""
        for link in self.links:
            if link.connection:
                link.cut(at_server=True)
        end = self.clock.now + 3 * PARK_S
        while self.clock.now < end and self.clock.step():
            pass
        sessions = sum(len(server.verifier.sessions) for server in self.servers)
        slots = sum(server.verifier.kv.owned_slots for server in self.servers)
        return [f"{sessions} sessions and {slots} slots were never freed"] if sessions or slots else []

    # --- connections and trouble

    def _connect(self, link: ChaosLink) -> None:
        self._connections += 1
        link.connect(self._connections)

    def _down_the_line(self, connection: int, frame: bytes) -> None:
        for link in self.links:
            link.receive(connection, frame)

    def _trouble(self) -> None:
        chaos, rng = self.chaos, self.rng
        if rng.random() < chaos.restart:
            server = rng.choice(self.servers)
            server.restart()
            for link in self.links:
                if link.server is server:
                    self._break(link, at_server=False)
        elif rng.random() < chaos.lose:
            self._break(rng.choice(self.links), at_server=True)
        elif self._running and rng.random() < chaos.cancel:
            session = self._running[rng.choice(list(self._running))]
            if not session.cancelled:
                session.cancel()

    def _break(self, link: ChaosLink, *, at_server: bool) -> None:
        if link.connection:
            link.cut(at_server=at_server)
            self.counts["reconnects"] += 1
            away = self.rng.choice((0.001, 0.05, 0.2, 1.0, 2 * PARK_S))
            self.counts["outlived_parking"] += away > PARK_S
            if self.rng.random() < self.chaos.move:
                self.counts["moves"] += 1
                if self.rng.random() < 0.5:  # not for long
                    soon = away + self.rng.uniform(0.2, 1.5)
                    self.clock.after(soon, lambda: self._break(link, at_server=True))
                link.server = self.servers[link.server is self.servers[0]]
            self.clock.after(away, lambda: self._connect(link))
