"""Opens whose grammar has yet to be compiled: that is done in a thread, and they wait for it without holding up others.

What else comes for such a session meanwhile waits behind its Open.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from wisp.api.prepare import PromptWork
from wisp.core.errors import GrammarError
from wisp.core.protocol.constraints import Grammar
from wisp.core.protocol.messages import Cancel, Draft, Open, Refused
from wisp.core.protocol.step import INVALID_GRAMMAR
from wisp.core.verify.admission import Refusal
from wisp.engines.constraining import Compiler

log = logging.getLogger("wisp.host")

MOST_WAITING = 64  # messages of a connection that wait; more are refused

Session = tuple[int, str]  # connection and session id


class Compiling:
    """Messages on their way to the verifier. `take(connection, message)` hands one over, `refuse` answers it. Nothing
    is compiled for a key that `admit` raises Refusal for.

    Compilation is work on a request like that on its prompt, with the same threads' worth and shares per key.
    """

    def __init__(
        self,
        grammars: Compiler,
        admit: Callable[[str], object],
        take: Callable[[int, Open | Draft | Cancel], None],
        refuse: Callable[[int, Refused], None],
    ) -> None:
        self._grammars = grammars
        self._admit = admit
        self._take = take
        self._refuse = refuse
        self._work = PromptWork()
        self._waiting: dict[Session, list[Open | Draft | Cancel]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def held(self, connection: int, key: str, message: Open | Draft | Cancel) -> bool:
        """Does this message wait? It is handed over later, or refused, if so."""
        session = (connection, message.session)
        queue = self._waiting.get(session)
        if queue is not None:
            if len(queue) < MOST_WAITING:
                queue.append(message)
            return True
        grammar = _grammar(message)
        if grammar is None or self._grammars.ready(grammar, key):
            return False
        self._waiting[session] = [message]
        task = asyncio.get_running_loop().create_task(self._compile(session, key, grammar))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return True

    def lost(self, connection: int) -> None:
        """The connection is gone, and with it what waits."""
        for session in [s for s in self._waiting if s[0] == connection]:
            del self._waiting[session]

    async def _compile(self, session: Session, key: str, grammar: Grammar) -> None:
        problem = ""
        try:
            await self._work.run(
                key, lambda: self._admit(key), lambda check: self._grammars.compile(grammar, key)
            )
        except Refusal:
            pass  # which the verifier says once more, and counts
        except GrammarError as error:
            problem = str(error)
        except Exception:  # sessions must hear of it
            log.exception("a grammar was not compiled")
            problem = "this grammar cannot be compiled; the server's log has more"
        connection, name = session
        waiting = self._waiting.pop(session, [])
        for message in waiting:
            if not problem:
                self._take(connection, message)
            elif not isinstance(message, Cancel):
                self._refuse(connection, Refused(name, INVALID_GRAMMAR, problem, 0.0, True, message.round))


def _grammar(message: Open | Draft | Cancel) -> Grammar | None:
    """That of an Open which is in order, as far as this can be seen here: what is not, the verifier refuses."""
    constraints = message.sampling.constraints if isinstance(message, Open) else None
    return constraints.grammar if constraints is not None and constraints.problem() is None else None
