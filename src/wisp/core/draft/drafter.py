"""The drafter: one session on the edge. Events in, actions out; no I/O, no clock, no model.

    DETACHED --connected--> IN_FLIGHT --verdict--> DRAFTING --sent--> IN_FLIGHT ... --> DONE
                               `--(server mode)--> SERVED --tokens--> SERVED ... (drafting pays again) --> DRAFTING

The guesses beyond the committed tokens are one chain. Its first `sent` tokens are in flight. The rest is the draft in
the making, or was drafted ahead. A verdict that agrees moves along the chain; any other clears it.

A draft made ahead may be sent before the verdict that it bets on (`Ahead.send`). It restates the chain, with the
tokens in flight and the guess at the verdict's own token. If all of that was right, the verifier has the next draft as
soon as its step ends, without a round trip in between. Otherwise the draft costs the verifier one comparison, unless
one of its branches (`branches`) is right: what the device drafted, in time to spare, for other outcomes.

Prompt and committed tokens are kept here. When a connection or a verifier is lost, `connected` opens the session again
from them, and the text goes on where it was, but never with another model than the one that began it.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from wisp.core.draft.branches import Branches, Guess
from wisp.core.draft.chain import Chain, Flight, Rounds
from wisp.core.draft.policies import CERTAIN, Ahead, DraftingPolicy, View
from wisp.core.draft.refusals import BUSY, MAX_REOPENINGS, REOPEN, busy_error, model_changed, wait_s
from wisp.core.draft.round_times import RoundTimes
from wisp.core.draft.signals import Signal
from wisp.core.draft.task import DETACHED, DONE, DRAFTING, IN_FLIGHT, SERVED, Action, Opening, Reopen, Task
from wisp.core.errors import ProtocolError, RequestError
from wisp.core.protocol.messages import Branch, Device, Draft, Open, Refused, Verdict
from wisp.core.protocol.step import INVALID_GRAMMAR, Committed


class Drafter:
    """One session. `policy` None means: never draft, let the verifier decode. `ahead` None: never draft ahead.

    The host calls `connected`, `lost`, `verdict` and `refused` as these happen, and, while `wants_token`,
    asks its draft engine for a token after `context` and hands it to `proposed`. Times are milliseconds.

    committed: the text so far; chain: guesses beyond it; branches: others
    opening:   the verifier, as of the last Open; rounds: what it was asked
    times:     measurements of speed
    """

    __slots__ = (
        "_goes_on_ms", "_warm", "ahead", "branches", "chain", "committed", "eos", "opening", "phase", "policy",
        "rounds", "session", "task", "times",
    )  # fmt: skip

    def __init__(
        self,
        session: str,
        task: Task,
        policy: DraftingPolicy | None,
        eos: frozenset[int],
        *,
        ahead: Ahead | None = None,
        times: RoundTimes | None = None,
    ) -> None:
        self.session = session
        self.task = task
        self.policy = policy
        self.ahead = ahead
        self.eos = eos
        self.phase = DETACHED
        self.committed: list[int] = []
        self.chain = Chain()
        self.branches = Branches()
        self.opening = Opening(task.digest)
        self.rounds = Rounds(serve=policy is None)
        self.times = times or RoundTimes()
        self._warm = False  # the draft engine has read the prompt
        self._goes_on_ms = -1.0  # when it was last found worth while to draft on ahead

    @property
    def position(self) -> int:
        """Index, among the generated tokens, of the token to draft next."""
        return len(self.committed) + len(self.guesses)

    @property
    def guesses(self) -> list[int]:
        """What the next drafted token follows, beyond the committed tokens."""
        branch, tokens = self.branches.growing, self.chain.tokens
        return tokens if branch is None else tokens[: branch.at] + branch.tokens

    def context(self) -> list[int]:
        """What the next drafted token follows."""
        return self.task.prompt + self.committed + self.guesses

    def wants_token(self, now_ms: float) -> bool:
        """Is it the draft engine's turn?"""
        phase = self.phase
        if phase is not IN_FLIGHT:
            return phase is DRAFTING
        if self._goes_on_ms == now_ms:  # found just now, and nothing has happened since
            return True
        if self.ahead is None or self.policy is None or self.rounds.serve:
            return False
        return self._goes_on(self._view(now_ms))

    # --- events

    def connected(
        self, now_ms: float, max_draft: int, digest: str = "", max_branches: int = 0
    ) -> list[Action]:
        """There is a verifier, and it takes drafts of up to `max_draft` tokens: open the session, or open it again.

        max_branches: of one draft. digest: of its model. Raises RequestError if the session has another model.
        """
        if self.phase is DONE:
            return []
        task, chain, opening, rounds = self.task, self.chain, self.opening, self.rounds
        if opening.digest and digest != opening.digest:
            self.phase = DONE
            raise model_changed()
        rounds.number += 1
        rounds.serve = serve = self.policy is None
        rounds.began_ms = now_ms
        opening.digest, opening.max_draft, opening.round = digest, max_draft, rounds.number
        opening.max_branches = max_branches
        chain.wasted += self.branches.clear()
        opening.epoch += 1
        chain.sent = max(0, min(chain.sent or len(chain.tokens), self._most()))
        chain.dry = False
        self.phase = SERVED if serve else IN_FLIGHT
        rounds.flights = [] if serve else [self._flight(now_ms, chain.sent)]
        open_ = Open(
            self.session,
            opening.epoch,
            task.prompt,
            task.sampling,
            task.max_tokens,
            round=opening.round,
            committed=list(self.committed),
            draft=chain.tokens[: chain.sent],
            serve=serve,
            ignore_eos=task.ignore_eos,
            logprobs=task.logprobs,
            slo=task.slo,
            salt=task.salt,
            digest=digest,
            device=self._device(),
            trace=task.trace,
        )
        return [open_]

    def moved(self, max_draft: int, max_branches: int) -> None:
        """The session was opened at another verifier than `connected` told of, which takes this much."""
        self.opening.max_draft, self.opening.max_branches = max_draft, max_branches

    def lost(self) -> None:
        if self.phase is not DONE:
            self.phase = DETACHED
            self.rounds.flights = []

    def proposed(
        self,
        now_ms: float,
        token: int | None,
        signal: Signal,
        took_ms: float = 0.0,
        then: Sequence[int] = (),
        other: int | None = None,
    ) -> list[Action]:
        """The draft engine, in `took_ms`, proposes `token` after `context` (None: it has nothing to propose), and
        `then` what follows for certain. other: its second choice in the place of `token`, if it has one.
        """
        phase = self.phase
        if phase is not DRAFTING and phase is not IN_FLIGHT:
            return []  # a broken connection came first
        self._goes_on_ms = -1.0
        policy, chain, branch = self.policy, self.chain, self.branches.growing
        assert policy is not None
        if other is not None and self._ends(other):
            other = None  # nothing follows it, so a branch could not go on
        if branch is not None:
            self.branches.growing = None
            self._grown(now_ms, branch, token, signal, took_ms, other)
        elif token is None:
            chain.dry = True
        else:
            if self._warm:
                if not signal.certain:
                    self.times.drafted(took_ms)
            elif not signal.certain:
                self._warm = True  # the first step reads the prompt
            chain.add(token, policy.judge(signal, chain.p), ends=self._ends(token), other=other)
            for certain in then:
                if chain.ended or self.position >= self.task.max_tokens - 1:
                    break
                chain.add(certain, CERTAIN, ends=self._ends(certain))
        return self._send_ahead(now_ms) if phase is IN_FLIGHT else self._go_on(now_ms, self._view(now_ms))

    def _grown(
        self,
        now_ms: float,
        branch: Guess,
        token: int | None,
        signal: Signal,
        took_ms: float,
        other: int | None,
    ) -> None:
        """`branch` has another token, or nothing to follow."""
        policy = self.policy
        assert policy is not None
        if branch not in self.branches.guesses:
            self.branches.guesses.append(branch)
        if token is None:
            branch.full = True
            return
        if not signal.certain:  # otherwise no model was asked
            self.times.drafted(took_ms)
        before = [*self.chain.p[: branch.at], 1.0, *branch.p]
        branch.add(token, policy.judge(signal, before), other, ends=self._ends(token))
        drafted = len(branch.p)
        branch.worth = min(drafted, policy.take(View(now_ms, branch.p, 0, 0, 0.0, self.times)))
        branch.full = branch.ended or branch.worth < drafted

    def _ends(self, token: int) -> bool:
        """Does nothing follow it?"""
        return (token in self.eos and not self.task.ignore_eos) or token in self.task.sampling.stops

    def verdict(self, now_ms: float, verdict: Verdict, arrived_ms: float | None = None) -> list[Action]:
        """Take the newly committed tokens, and go on. The verdict may have arrived earlier, during a draft step.

        Raises ProtocolError where it contradicts tokens that were committed before. Then the text so far stands, and
        this verifier cannot be trusted with the rest.
        """
        phase, chain, rounds = self.phase, self.chain, self.rounds
        if phase is DONE:
            return []
        new = self._new_tokens(verdict)
        if new is None:
            return []
        self._goes_on_ms, self.branches.growing = -1.0, None
        self.times.price = verdict.price
        flight = rounds.landed(verdict.round) if phase is IN_FLIGHT else None
        before = len(verdict.tokens) - len(new)  # of the draft, settled earlier
        drafted = accepted = 0
        if flight is not None and new:  # otherwise it was stale, and nothing was verified
            drafted = max(0, flight.drafted - before)
            accepted = min(max(0, verdict.accepted - before), drafted)
        logprobs = verdict.logprobs[-len(new) :] if new and verdict.logprobs else []
        fresh = Committed(
            new, logprobs, drafted, accepted, min(len(new), accepted), verdict.finish, None, verdict.cached
        )
        if flight is not None:
            arrived = now_ms if arrived_ms is None else arrived_ms
            self._learn(now_ms, arrived, flight, drafted, verdict, new)
        elif rounds.serve and new and phase is SERVED:
            self.times.decoded(len(new), now_ms - rounds.began_ms)
            rounds.began_ms = now_ms
        elif not rounds.serve:
            rounds.unasked += len(new)
            if new:
                self.times.verify.add(0.0, verdict.engine_ms)  # a step without a draft of ours
        if new:
            self.opening.reopened = 0
            self.committed += new
            self._settle(new, flight, drafted)
        if flight is not None or new:
            chain.wasted += self.branches.clear()
        if not rounds.flights:
            chain.sent = 0
        if verdict.finish:
            self.phase = DONE
            return [fresh]
        deliver: list[Action] = [fresh] if new or drafted else []
        if flight is not None or (phase is IN_FLIGHT and not rounds.flights):  # or its bet was lost
            rounds.began_ms = now_ms
            if rounds.flights:  # its successor is with the verifier already
                rounds.flights[0].due_ms = now_ms + self.times.engine_ms(chain.sent)
                return deliver
            return deliver + self._start_round(now_ms)
        if phase is SERVED and self.policy is not None:
            return deliver + self._start_round(now_ms)
        return deliver

    def _settle(self, new: list[int], flight: Flight | None, drafted: int) -> None:
        """Go along the chain with the committed tokens `new`, or along the branch that they follow."""
        chain, rounds = self.chain, self.rounds
        n = chain.agreed(new)
        if chain.settle(new, chain.sent if flight is None else drafted):
            if self.branches.guesses and not chain.sent:
                rounds.flights = []  # the verifier has branches only, and they are for other outcomes
            return
        branch = self.branches.following(n, new) if flight is not None else None
        if branch is not None:
            gone = len(new) - n  # tokens of the branch
            tokens, odds, others = branch.tokens[gone:], branch.odds[gone - 1 :], branch.others[gone - 1 :]
            chain.follow(tokens, odds, others, max(0, branch.sent - (gone - 1)), ended=branch.ended)
            branch.sent = len(branch.p)  # none of it is wasted
            self.branches.taken += 1
        if chain.sent and rounds.flights:
            next_up = rounds.flights[0]
            next_up.drafted = len(self.committed) - next_up.base + chain.sent
        else:
            rounds.flights = []  # no draft that builds on a wrong guess is of any use

    def refused(self, refused: Refused) -> list[Action]:
        """The verifier refuses. Some refusals are mended by opening again; the others raise RequestError.

        A refusal from before the last Open is ignored: one Open answers all refusals of drafts that were in flight
        together.
        """
        opening = self.opening
        if self.phase is DETACHED or self.phase is DONE or 0 <= refused.round < opening.round:
            return []
        if refused.code in REOPEN and opening.reopened < MAX_REOPENINGS:
            opening.reopened += 1
            self.lost()
            return [Reopen(wait_s(refused.retry_after))]
        busy = refused.code in BUSY
        if busy and self.committed:  # this session was admitted before, by a verifier that has gone: insist
            self.lost()
            return [Reopen(max(0.1, wait_s(refused.retry_after)))]
        self.phase = DONE
        if busy:
            raise busy_error(refused.code, refused.message, refused.retry_after)
        if refused.code == "context_length_exceeded":
            raise RequestError(400, refused.message, code=refused.code, param="messages")
        if refused.code == INVALID_GRAMMAR:
            raise RequestError(400, refused.message, code=refused.code, param="grammar")
        raise RequestError(
            502, f"the verifier refused: {refused.message}", code=refused.code, type="server_error"
        )

    # --- inside a round

    def _start_round(self, now_ms: float) -> list[Action]:
        assert self.policy is not None
        if self.rounds.serve and self.phase is IN_FLIGHT:  # the verifier has taken over, as it was asked to
            self.phase = SERVED
            return []
        view = self._view(now_ms)
        better_served = self.policy.serve(view)
        if better_served and self.phase is SERVED:
            return []
        self.rounds.serve = better_served
        self.phase = DRAFTING
        self.chain.dry = False
        return [self._send(now_ms, 0)] if better_served else self._go_on(now_ms, view)

    def _go_on(self, now_ms: float, view: View) -> list[Action]:
        policy, chain = self.policy, self.chain
        assert policy is not None
        full = chain.dry or chain.ended or len(chain.tokens) - chain.sent >= self._most()
        if not full and policy.more(view):
            return []
        return [self._send(now_ms, policy.take(view))]

    def _send(self, now_ms: float, most: int, branches: list[Branch] | None = None) -> Draft:
        chain, rounds = self.chain, self.rounds
        rounds.number += 1
        tokens = chain.tokens
        chain.sent = sent = max(0, min(most, len(tokens), self._most()))
        chain.dry = False
        self.phase = IN_FLIGHT
        rounds.flights.append(self._flight(now_ms, sent))
        return Draft(
            self.session, rounds.number, len(self.committed), tokens[:sent], rounds.serve, branches or []
        )

    def _goes_on(self, view: View, *, along_chain: bool | None = None) -> bool:
        """Is another token worth drafting while a draft is in flight? The one that is likelier to be of use comes
        next: the chain's, or that of a branch (`branches.growing`).

        along_chain: is the chain's next token worth it? None: not known yet
        """
        ahead, policy, branches, chain = self.ahead, self.policy, self.branches, self.chain
        flights = self.rounds.flights
        assert ahead is not None
        assert policy is not None
        branches.growing = None
        room = self.task.max_tokens - len(self.committed) - 1
        if along_chain is None:
            open_end = not (chain.dry or chain.ended) and len(chain.tokens) < room
            along_chain = open_end and ahead.worth(view, self.times.price if policy.priced else 0.0)
        most = self.opening.max_branches
        if not (most and ahead.send and flights) or self.rounds.number == self.opening.round:
            return along_chain
        first, longest = flights[0], min(ahead.longest, self.opening.max_draft)
        verified = first.base + first.drafted - len(self.committed)
        best = branches.best(chain, verified, self.times.second.value, most, room, longest)
        if best is None or not ahead.pays(best.right, 1, view, first.due_ms):
            return along_chain
        if not along_chain or best.right > prod(chain.p):
            branches.growing = best
        return True

    def _send_ahead(self, now_ms: float) -> list[Action]:
        """Send the draft made ahead before the verdict is here, if it is complete, or if time runs out. Branches go
        with it, or with the same draft once more."""
        rounds, ahead, chain, policy = self.rounds, self.ahead, self.chain, self.policy
        flights = rounds.flights
        if not flights or ahead is None or not ahead.send or rounds.serve:
            return []
        assert policy is not None
        times, due_ms, opening, alone = self.times, flights[0].due_ms, rounds.number == 0, len(flights) == 1
        last_call = due_ms - times.line.value - 0.5 * times.wait.deviation
        late = times.wait.n > 0 and now_ms + times.draft.value > last_call and not opening
        n, sent = len(chain.tokens), chain.sent
        first = sent + 1  # the one before it guesses the verdict's own token
        if alone and n > first:
            view = View(now_ms, chain.p, sent, first, due_ms, times, opening)
            full = chain.dry or chain.ended or len(self.committed) + n >= self.task.max_tokens - 1
            complete = late or full or not policy.more(view)
            if not complete and ahead.worth(view, times.price if policy.priced else 0.0):
                self._goes_on(view, along_chain=True)
                self._goes_on_ms = now_ms
                return []
            n = policy.take(view)
            if n > 0:
                return [self._send(now_ms, first + n, self.branches.to_send())]
        if not self.branches.guesses:
            return []
        goes_on = self._goes_on(self._view(now_ms))
        if goes_on:
            self._goes_on_ms = now_ms
        if goes_on and not late and (alone or self.branches.growing is not None):
            return []  # there is more to send soon
        return self._send_branches(now_ms)

    def _send_branches(self, now_ms: float) -> list[Action]:
        """Send branches: with the draft made ahead, once more, or with the tokens in flight alone."""
        chain, rounds, base = self.chain, self.rounds, len(self.committed)
        last = rounds.flights[-1]
        if last.base != base or not (branches := self.branches.to_send()):
            return []
        if len(rounds.flights) == 1:
            return [self._send(now_ms, chain.sent, branches)]
        return [Draft(self.session, last.round, base, chain.tokens[: chain.sent], rounds.serve, branches)]

    def _flight(self, now_ms: float, drafted: int) -> Flight:
        due_ms = now_ms + self.times.wait_ms(drafted)
        return Flight(
            self.rounds.number, drafted, now_ms, due_ms, not self.rounds.flights, len(self.committed)
        )

    def _view(self, now_ms: float) -> View:
        chain, rounds = self.chain, self.rounds
        flights, sent = rounds.flights, chain.sent
        due_ms = flights[-1].due_ms if flights else 0.0
        return View(now_ms, chain.p, sent, sent, due_ms, self.times, rounds.number == 0)

    def _device(self) -> Device | None:
        times = self.times
        known = times.draft.n or times.line.n
        return Device(round(times.draft.value, 2), round(times.line.value, 2)) if known else None

    def _most(self) -> int:
        """The longest draft now: the last token of all is always the target's own."""
        left, most = self.task.max_tokens - len(self.committed) - 1, self.opening.max_draft
        return left if left < most else most

    def _learn(
        self, now_ms: float, arrived_ms: float, flight: Flight, drafted: int, verdict: Verdict, new: list[int]
    ) -> None:
        """Learn times and acceptance from a settled round. Its correction or bonus tells of the next guess, too."""
        assert self.policy is not None
        times, chain, rounds = self.times, self.chain, self.rounds
        if flight.round > 0:  # the first one read the prompt
            waited = arrived_ms - flight.sent_ms if flight.alone else None
            if new:
                times.verdict(drafted, waited, verdict.queue_ms, verdict.engine_ms)
            elif waited is not None:
                times.wait.add(waited)  # the verifier has decoded all of it by itself
            times.round(drafted, len(new) + rounds.unasked, now_ms - rounds.began_ms)
        rounds.unasked = 0
        agreed = chain.agreed(new)
        seen = min(len(new), len(chain.tokens), agreed + 1)
        times.acceptance.add_each(agreed, seen)
        if agreed < seen and (other := chain.others[agreed]) is not None:
            times.second.add(float(new[agreed] == other))
        self.policy.observe(chain.odds[:seen], agreed)

    def _new_tokens(self, verdict: Verdict) -> list[int] | None:
        """The tokens of `verdict` beyond the text; None if it was given before the last Open, and does not fit.

        A session that comes back to a verifier, on the same connection, may have missed some of its verdicts, and
        then hear the next ones. An Open that is answered fits: it says what the edge has.
        """
        base, tokens, n = verdict.base, verdict.tokens, len(self.committed)
        if base + len(tokens) > self.task.max_tokens:
            raise ProtocolError("conflict", "the verifier writes more than it was asked for")
        if base == n:
            return tokens
        known = self.committed[base:]
        overlap = min(len(known), len(tokens))
        if 0 <= base <= n and known[:overlap] == tokens[:overlap]:
            return tokens[overlap:]
        if 0 <= verdict.round < self.opening.round:
            return None
        raise ProtocolError("conflict", "the verifier contradicts what it committed before")
