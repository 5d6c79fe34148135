"""Sessions and their steps as spans of a trace: made of what the verifier is told and does, as its page is."""

from __future__ import annotations

from collections import deque

from wisp.api import tracing
from wisp.core.protocol.messages import Open, Refused, Verdict
from wisp.core.verify.events import Action, Ended, InEvent, Received, Run, Send, StepDone
from wisp.core.verify.planner import KINDS, kind_of
from wisp.core.verify.verifier import Verifier


class SessionSpans:
    """Call it after each event. Times are seconds."""

    def __init__(self, verifier: Verifier) -> None:
        self._verifier = verifier
        self._sessions: dict[str, tracing.Span] = {}
        self._tokens: dict[str, int] = {}  # committed, by session
        # By step in flight: the spans in it, each with the place of its slice
        self._in_flight: deque[list[tuple[int, tracing.Span]]] = deque()

    def __call__(self, now: float, event: InEvent, actions: list[Action]) -> None:
        """An event was handled, with these actions."""
        if isinstance(event, StepDone):
            self._done(now, event)
        elif isinstance(event, Received) and isinstance(event.message, Open):
            self._opened(now, event.message)
        for action in actions:
            if isinstance(action, Send):
                self._sent(now, action.message)
            elif isinstance(action, Run):
                self._dispatch(now, action)
            elif isinstance(action, Ended):
                self._over(now, action.session, action.why)

    def _opened(self, now: float, open_: Open) -> None:
        if open_.session in self._sessions:  # resumed
            return
        trace = tracing.traceparent(open_.trace)
        span = tracing.start("session", trace, now, served=True)
        if span.recording:
            self._sessions[open_.session] = span
            self._tokens[open_.session] = len(open_.committed)

    def _sent(self, now: float, message: Verdict | Refused) -> None:
        if message.session not in self._sessions:
            return
        if isinstance(message, Refused):
            if message.fatal:
                self._over(now, message.session, "refused", error=message.code)
            return
        tokens = message.base + len(message.tokens)
        self._tokens[message.session] = max(tokens, self._tokens[message.session])
        if message.finish:
            self._over(now, message.session, message.finish)

    def _over(self, now: float, session: str, finish: str, *, error: str = "") -> None:
        span = self._sessions.pop(session, None)
        if span is not None:
            tokens = self._tokens.pop(session)
            span.end(
                now, {"wisp.session": session, "wisp.tokens": tokens, "wisp.finish": finish}, error=error
            )

    def _dispatch(self, now: float, run: Run) -> None:
        step: list[tuple[int, tracing.Span]] = []
        self._in_flight.append(step)
        for place, s in enumerate(run.slices):
            span = self._sessions.get(self._verifier.sessions[s.session].id)
            if span is not None:
                attributes: tracing.Attributes = {
                    "wisp.kind": KINDS[kind_of(s)],
                    "wisp.rows": len(s.tokens),
                    "wisp.drafted": s.n_draft,
                    "wisp.slices": len(run.slices),
                }
                step.append((place, span.child("step", now, attributes)))

    def _done(self, now: float, done: StepDone) -> None:
        for place, span in self._in_flight.popleft():
            if done.error:
                span.end(now, error="engine_error")
            else:
                result = done.results[place]
                attributes: tracing.Attributes = {
                    "wisp.accepted": result.accepted,
                    "wisp.engine_ms": done.engine_ms,
                }
                span.end(now, attributes, error=result.code if result.error else "")
