"""Opens whose grammar has yet to be compiled: that is done in a thread, and they wait for it without holding up others.

What else comes for such a session meanwhile waits behind its Open. Nothing is compiled for a session that is gone.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable

from wisp.api.prepare import PromptWork
from wisp.core.errors import GrammarBusyError, GrammarError
from wisp.core.protocol.constraints import Grammar
from wisp.core.protocol.messages import Cancel, Draft, Open, Refused
from wisp.core.protocol.step import INVALID_GRAMMAR
from wisp.core.verify.admission import Refusal
from wisp.engines.constraining import Compiler

log = logging.getLogger("wisp.host")

MOST_MESSAGES = 64  # of a session that waits; more are refused

Task = asyncio.Task[None]


class Waiting:
    """An Open, and what came for its session since."""

    def __init__(self, open_: Open) -> None:
        self.messages: list[Open | Draft] = [open_]
        self.task: Task | None = None


class Compiling:
    """Messages on their way to the verifier. `take(connection, message)` hands one over, `refuse(connection, message,
    answer)` answers it. Nothing is compiled for a key that `admit` raises Refusal for.

    Compilation is work on a request like that on its prompt, with the same threads' worth and shares per key.
    """

    def __init__(
        self,
        grammars: Compiler,
        admit: Callable[[str], object],
        take: Callable[[int, Open | Draft | Cancel], None],
        refuse: Callable[[int, Open | Draft, Refused], None],
        *,
        most: int,
    ) -> None:
        """most: sessions of a connection that may wait, as many as may be open at the verifier; more are refused."""
        self._grammars = grammars
        self._admit = admit
        self._take = take
        self._refuse = refuse
        self._most = most
        self._work = PromptWork()
        self._waiting: defaultdict[int, dict[str, Waiting]] = defaultdict(dict)  # by connection and session
        self._tasks: set[Task] = set()

    def held(self, connection: int, key: str, message: Open | Draft | Cancel) -> bool:
        """Does this message wait? It is handed over later, or refused, if so."""
        waiting = self._waiting.get(connection, {}).get(message.session)
        if isinstance(message, Cancel):
            if waiting is not None:
                self._forget(connection, message.session)
            return False
        if waiting is not None:
            if len(waiting.messages) < MOST_MESSAGES:
                waiting.messages.append(message)
            else:
                self._busy(connection, message, "too much was sent for a session that has yet to begin")
            return True
        grammar = _grammar(message)
        if grammar is None or self._grammars.ready(grammar, key):
            return False
        assert isinstance(message, Open)
        if len(self._waiting.get(connection, {})) >= self._most:
            self._busy(connection, message, "too many sessions wait for their grammars; try again")
            return True
        waiting = self._waiting[connection][message.session] = Waiting(message)
        waiting.task = task = asyncio.get_running_loop().create_task(
            self._compile(connection, message.session, key, grammar)
        )
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return True

    def lost(self, connection: int) -> None:
        """The connection is gone, and with it what waits."""
        for session in list(self._waiting.get(connection, ())):
            self._forget(connection, session)

    def _forget(self, connection: int, session: str) -> None:
        task = self._pop(connection, session).task
        if task is not None:
            task.cancel()

    def _pop(self, connection: int, session: str) -> Waiting:
        sessions = self._waiting[connection]
        found = sessions.pop(session)
        if not sessions:
            del self._waiting[connection]
        return found

    def _busy(self, connection: int, message: Open | Draft, why: str) -> None:
        fatal = isinstance(message, Open)
        refused = Refused(message.session, "overloaded", why, 1.0, fatal, message.round)
        self._refuse(connection, message, refused)

    async def _compile(self, connection: int, session: str, key: str, grammar: Grammar) -> None:
        problem, code, retry_after = "", INVALID_GRAMMAR, 0.0
        try:
            await self._work.run(
                key, lambda: self._admit(key), lambda check: self._grammars.compile(grammar, key)
            )
        except Refusal:
            pass  # which the verifier says once more, and counts
        except GrammarBusyError as error:
            problem, code, retry_after = str(error), "overloaded", 1.0
        except GrammarError as error:
            problem = str(error)
        except Exception:  # sessions must hear of it
            log.exception("a grammar was not compiled")
            problem = "this grammar cannot be compiled; the server's log has more"
        first, *rest = self._pop(connection, session).messages
        if problem:
            for message in (first, *rest):
                refused = Refused(session, code, problem, retry_after, True, message.round)
                self._refuse(connection, message, refused)
            return
        self._take(connection, first)
        for message in rest:
            if not self.held(connection, key, message):  # another Open may have another grammar
                self._take(connection, message)


def _grammar(message: Open | Draft) -> Grammar | None:
    """That of an Open which is in order, as far as this can be seen here: what is not, the verifier refuses."""
    constraints = message.sampling.constraints if isinstance(message, Open) else None
    return constraints.grammar if constraints is not None and constraints.problem() is None else None
