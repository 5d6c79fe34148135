"""A device in virtual time, and its link. The objects that decide are the live ones; only time is modelled.

    Fleet -- starts requests on --> SimDevice (core.draft.Drafter) --link--> SimVerifier (core.verify.Verifier)
                                            ^-----------------link---------------'    steps last as its profile says

Text comes from scripts, so every verification is decided as it would be live. Under one seed a run is always the same.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from wisp.calibrate.traces.scripts import Script, Scripts
from wisp.core.draft.drafter import Drafter
from wisp.core.draft.policies import Ahead, Policies
from wisp.core.draft.round_times import RoundTimes
from wisp.core.draft.signals import Signal
from wisp.core.draft.task import DONE, Action, Task
from wisp.core.errors import ProtocolError, RequestError
from wisp.core.protocol.messages import MAX_DRAFT, Cancel, Draft, Open, Refused, Verdict
from wisp.core.protocol.sampling import Sampling
from wisp.core.protocol.step import Committed
from wisp.core.verify.kv import common_prefix
from wisp.sim.devices import Device, Link
from wisp.sim.request import Request
from wisp.sim.sim_verifier import Event
from wisp.sim.timeline import Timeline

READ_AHEAD = 20.0  # prompt tokens that a drafter reads in the time of one draft step
WRONG_TEXT_PAUSE_S = 1.0  # before the next request of a device whose verifier contradicted itself


@dataclass(slots=True)
class DraftCounts:
    """All devices together. draft_steps: passes of a draft model; wasted_ms: drafting past a first rejection;
    ahead_wasted: tokens drafted and never sent."""

    draft_steps: int = 0
    drafting_ms: float = 0.0
    wasted_ms: float = 0.0
    ahead_wasted: int = 0


class Uplink(Protocol):
    """A verifier as its devices see it. `senders` deliver its messages, one for each connected device."""

    senders: dict[int, Callable[[Verdict | Refused], None]]

    def receive(self, connection: int, message: Open | Draft | Cancel) -> None: ...

    def lost(self, connection: int) -> None: ...


class SimLink:
    """A device's link, in both directions. It keeps order: no message overtakes one that was sent before it."""

    __slots__ = ("_down", "_link", "_source", "_up")

    def __init__(self, link: Link, source: random.Random) -> None:
        self._link = link
        self._source = source
        self._up = self._down = 0.0  # when the last message arrives

    def up_s(self, now: float) -> float:
        """Seconds until a message to the verifier, sent now, arrives."""
        self._up = max(self._up, now + self._link.one_way_ms(self._source) / 1e3)
        return self._up - now

    def down_s(self, now: float) -> float:
        """Seconds until a message from the verifier, sent now, arrives."""
        self._down = max(self._down, now + self._link.one_way_ms(self._source) / 1e3)
        return self._down - now


@dataclass(slots=True)
class Shared:
    """The part of a device that its whole fleet shares.

    ended:   is told of each request that is over, and of its device
    retries: how often a refused request is sent again after Retry-After
    max_draft, branches: most tokens and branches of a draft
    trace:   collects events, if there is one
    """

    env: Timeline
    uplink: Uplink
    scripts: Scripts
    ended: Callable[[SimDevice, Request], None]
    ahead: Ahead | None = None
    retries: int = 0
    max_draft: int = MAX_DRAFT
    branches: int = 0
    counts: DraftCounts = field(default_factory=DraftCounts)
    trace: list[Event] | None = None


@dataclass(slots=True)
class Generation:
    """An answer in the making. sent_*: the last draft; waiting_since: the later of that and the last verdict, s.

    read_base, read: what the draft model read last: so many committed tokens, and guesses
    """

    request: Request
    script: Script
    drafter: Drafter
    prompt_read: bool = False  # by the draft model
    sent_round: int = -1
    sent_tokens: int = 0
    read_base: int = 0
    read: list[int] = field(default_factory=list)
    waiting_since: float = 0.0

    def mistakes(self) -> int:
        """Committed tokens that the script does not have."""
        committed, script = self.drafter.committed, self.script.tokens
        if committed == script[: len(committed)]:
            return 0
        differing = sum(a != b for a, b in zip(committed, script, strict=False))
        return differing + max(0, len(committed) - len(script))


# A draft step that is running: for what, its proposal (known at its start, told at its end), its milliseconds, and the
# second choice. A plain tuple: there are several for each token of a run, and a NamedTuple took 3 % of its time.
DraftStep = tuple[Generation, tuple[int | None, Signal], float, int | None]
NOTHING: tuple[int | None, Signal] = (None, Signal())


# One answered draft, or one token decoded by the verifier: the second at which its verdict was heard, the step's
# milliseconds, its tokens, and the cached ones before them. A plain tuple, too.
Pass = tuple[float, float, int, int]


@dataclass(slots=True)
class Seen:
    """Observations of a device, for the report. wrong: of `checked` tokens, and contradictory verdicts."""

    passes: list[Pass] = field(default_factory=list)
    checked: int = 0
    wrong: int = 0


class SimDevice:
    """A device in the field: one generation at a time, a draft engine that is busy or not, a link.

    Every answer is compared with its script.
    """

    __slots__ = (
        "_inbox", "_step", "asked", "away_s", "drafted_ms", "env", "generation", "gone", "index", "link", "policies",
        "profile", "rounds", "seen", "shared",
    )  # fmt: skip

    def __init__(
        self, shared: Shared, index: int, profile: Device, link: Link, policies: Policies | None, seed: int
    ) -> None:
        """policies: None for a device that never drafts; seed: of the link's delays."""
        self.shared = shared
        self.env = shared.env
        self.index = index
        self.profile = profile
        self.link = SimLink(link, random.Random(seed))
        self.policies = policies
        self.rounds = RoundTimes()  # learnt, from one answer to the next
        self.drafted_ms = 0.0  # by which a device grows warm
        self.asked = 0  # requests so far
        self.away_s = 0.0  # from the user, there and back: of a drafter beside the target
        self.gone = False
        self.generation: Generation | None = None
        self.seen = Seen()
        self._step: DraftStep | None = None
        self._inbox: list[tuple[float, Verdict | Refused]] = []  # with the time of arrival, ms
        shared.uplink.senders[index] = self._sent

    def start(self, request: Request) -> None:
        shared = self.shared
        policy = self.policies.make(0.0) if self.policies else None
        task = Task(request.prompt, Sampling(seed=request.seed), request.max_tokens, slo=request.slo)
        self.rounds = self.rounds.successor()
        drafter = Drafter(
            f"{self.index}:{request.seed}".rjust(8, "."), task, policy, shared.scripts.library.eos,
            ahead=shared.ahead if policy else None, times=self.rounds,
        )  # fmt: skip
        self.generation = generation = Generation(request, shared.scripts.script(request.seed), drafter)
        self._open(generation)
        self._go_on()

    def vanish(self) -> None:
        """Switched off in mid-sentence."""
        self.gone = True
        self.shared.uplink.senders.pop(self.index, None)
        if self.generation is not None:
            self._check(self.generation)
            self.generation.request.ok = False
            self.generation.request.ended = self.env.now
            self.generation = None
        self.shared.uplink.lost(self.index)

    def compared(self) -> tuple[int, int]:
        """Tokens compared with their scripts so far, and how many of them were wrong."""
        checked, wrong = self.seen.checked, self.seen.wrong
        if self.generation is not None:
            checked += len(self.generation.drafter.committed)
            wrong += self.generation.mistakes()
        return checked, wrong

    # --- the link

    def _open(self, generation: Generation) -> None:
        shared = self.shared
        connected = generation.drafter.connected(self.env.now * 1e3, shared.max_draft, "", shared.branches)
        self._carry_out(generation, connected)

    def _carry_out(self, generation: Generation, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Draft):
                self._send(generation, action, len(action.tokens))
            elif isinstance(action, Committed):
                wasted = action.drafted - action.accepted - 1
                if wasted > 0:
                    self.shared.counts.wasted_ms += wasted * self.profile.draft_ms(self.drafted_ms / 1e3)
            elif isinstance(action, Open):
                self._send(generation, action, len(action.draft))
            else:
                self.env.after(action.after_s, self._reopen)

    def _send(self, generation: Generation, message: Open | Draft, drafted: int) -> None:
        now = self.env.now
        generation.sent_round, generation.sent_tokens, generation.waiting_since = message.round, drafted, now
        receive = self.shared.uplink.receive
        self.env.after(self.link.up_s(now), lambda: None if self.gone else receive(self.index, message))

    def _reopen(self) -> None:
        if self.generation is not None:
            self._open(self.generation)

    def _sent(self, message: Verdict | Refused) -> None:
        self.env.after(self.link.down_s(self.env.now), lambda: self._heard(message))

    def _heard(self, message: Verdict | Refused) -> None:
        generation = self.generation
        if generation is None or message.session != generation.drafter.session:
            return
        if isinstance(message, Verdict):
            self._read(generation, message)
        self._inbox.append((self.env.now * 1e3, message))
        if self._step is None:
            self._go_on()

    def _read(self, generation: Generation, verdict: Verdict) -> None:
        """The user sees tokens as they arrive."""
        request, tokens, now = generation.request, verdict.base + len(verdict.tokens), self.env.now
        seen = now + self.away_s
        drafted = generation.sent_tokens if verdict.round == generation.sent_round else 0
        if tokens > request.tokens:
            if request.tokens:
                cached = len(request.prompt) + verdict.base
                self.seen.passes.append((now, verdict.engine_ms, drafted + 1, cached))
            request.hear(seen, tokens)
        if verdict.finish:
            request.ended = seen
        if self.shared.trace is not None:
            since = generation.waiting_since
            self.shared.trace.append(Event("wait", since, (now - since) * 1e3, drafted, device=self.index))
        generation.waiting_since = now

    # --- the loop of an edge: verdicts first, then the draft engine

    def _go_on(self) -> None:
        generation = self.generation
        if generation is None:
            return
        while self._inbox:
            arrived, message = self._inbox.pop(0)
            self._take(generation, arrived, message)
            if self.generation is not generation:  # over; the next one has gone on by itself
                return
        if generation.drafter.wants_token(self.env.now * 1e3):
            self._draft(generation)

    def _take(self, generation: Generation, arrived: float, message: Verdict | Refused) -> None:
        drafter, now = generation.drafter, self.env.now * 1e3
        try:
            if isinstance(message, Refused):
                actions = drafter.refused(message)
            else:
                actions = drafter.verdict(now, message, arrived)
        except RequestError as error:
            self._refused(generation, error.retry_after)
            return
        except ProtocolError:
            self.seen.wrong += 1
            self._fail(generation, WRONG_TEXT_PAUSE_S)
            return
        if actions:
            self._carry_out(generation, actions)
        if drafter.phase is DONE:
            self._finish(generation, self.away_s)

    def _refused(self, generation: Generation, retry_after: float | None) -> None:
        request = generation.request
        request.refusals += 1
        if retry_after and request.refusals <= self.shared.retries:
            self.generation = None
            self.env.after(retry_after, lambda: self._again(request))
            return
        request.refused = True
        self._fail(generation, retry_after or 1.0)

    def _again(self, request: Request) -> None:
        """The user of a refused request has waited as long as the refusal said."""
        if self.gone:
            request.ok, request.ended = False, self.env.now
        else:
            self.start(request)

    def _fail(self, generation: Generation, pause_s: float) -> None:
        generation.request.ok, generation.request.ended = False, self.env.now
        self._finish(generation, pause_s)

    def _finish(self, generation: Generation, pause_s: float) -> None:
        drafter, request = generation.drafter, generation.request
        self._check(generation)
        if request.ok and len(drafter.committed) != min(len(generation.script), request.max_tokens):
            self.seen.wrong += 1  # ended too early
        self.shared.counts.ahead_wasted += drafter.chain.wasted
        self.rounds = drafter.times
        self.generation = None
        self._inbox.clear()
        if pause_s:
            self.env.after(pause_s, lambda: self.shared.ended(self, request))
        else:
            self.shared.ended(self, request)

    def _check(self, generation: Generation) -> None:
        self.seen.checked += len(generation.drafter.committed)
        self.seen.wrong += generation.mistakes()

    def _draft(self, generation: Generation) -> None:
        drafter, script = generation.drafter, generation.script
        base, guesses = len(drafter.committed), len(drafter.chain.tokens)
        ms = self.profile.draft_ms(self.drafted_ms / 1e3)
        if not generation.prompt_read:
            ms += ms * len(drafter.task.prompt) / READ_AHEAD
            generation.prompt_read = True
        proposal, other = NOTHING, None
        if self.shared.branches:
            if (branch := drafter.branches.growing) is not None:  # as if its first token were the target's
                base, guesses = base + branch.at + 1, len(branch.tokens) - 1
            ms += ms * self._reread(generation) / READ_AHEAD
        proposal = script.propose(base, guesses) or NOTHING
        if self.shared.branches:
            # Where the second choice is wrong, the proposal stands for it: it is not what replaces the proposal either.
            second = script.second(base, guesses)
            other = proposal[0] if second is None else second
        self.drafted_ms += ms
        if self.shared.trace is not None:
            self.shared.trace.append(Event("draft", self.env.now, ms, guesses + 1, device=self.index))
        self._step = (generation, proposal, ms, other)
        self.env.after(ms / 1e3, self._drafted)

    def _reread(self, generation: Generation) -> int:
        """Tokens that the draft model has to read again before the last one, as it was at another branch since."""
        drafter = generation.drafter
        base, read, guesses = generation.read_base, generation.read, drafter.guesses
        text = drafter.committed[base:] + guesses
        generation.read_base, generation.read = len(drafter.committed), guesses[:]
        known = common_prefix(read, text)
        return max(0, min(len(read), len(text) - 1) - known)

    def _drafted(self) -> None:
        assert self._step is not None
        drafted_for, (token, signal), ms, other = self._step
        self._step = None
        self.shared.counts.draft_steps += 1
        self.shared.counts.drafting_ms += ms
        generation = self.generation
        if generation is None:
            return
        if drafted_for is generation:
            now, drafter = self.env.now * 1e3, generation.drafter
            actions = drafter.proposed(now, token, signal, ms, (), other)
            if actions:
                self._carry_out(generation, actions)
            if not self._inbox:
                if drafter.wants_token(now):
                    self._draft(generation)
                return
        self._go_on()
