"""A fleet and its verifier in virtual time (SimPy): the objects that decide are the live ones, only time is modelled.

    Fleet ---- starts requests on ----> SimDevice (core.Drafter)  --link-->  Cloud (core.Verifier) --> hardware profile
                                               ^------------------link------------'

Text comes from scripts, so every verification is decided as it would be live. Under one seed a run is always the same.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from wisp.core.verify.admission import Admission
from wisp.core.verify.batching import batching_policy
from wisp.core.verify.cost import Coefficients, CostModel, Load, load_of
from wisp.core.draft.drafter import DONE, Action, Drafter, Task
from wisp.core.draft.policies import Ahead, Policies
from wisp.core.errors import RequestError
from wisp.core.verify.events import EdgeLost, FromEdge, InEvent, Limits, Run, Send, StepDone, Tick, WakeAt
from wisp.core.protocol.messages import Cancel, Draft, Open, Refused, Verdict
from wisp.core.draft.round_times import RoundTimes
from wisp.core.protocol.sampling import Sampling
from wisp.core.draft.signals import Signal
from wisp.core.protocol.slo import Served, Slo
from wisp.core.verify.verifier import Verifier
from wisp.core.protocol.step import Committed
from wisp.engines.emulated import EmulatedTarget
from wisp.sim.devices import Device, Link
from wisp.calibrate.traces.scripts import Script, Scripts
from wisp.sim.timeline import Timeline

HOST_S = 2e-3  # what the server itself takes between steps of some 50 sequences: measured, on 2 slow cores
MAX_DRAFT = 32


@dataclass(slots=True)
class Request:
    """One request of a user and what became of it, however often it had to be sent. Times in seconds, at the user.

    refusals: times that it was refused; refused: for good
    """

    seed: int
    prompt: list[int]
    slo: Slo
    device: int
    arrived: float
    max_tokens: int
    first: float = 0.0
    last: float = 0.0
    tokens: int = 0
    ended: float | None = None
    ok: bool = True
    refused: bool = False
    refusals: int = 0
    gaps_ms: list[float] = field(default_factory=list)  # between messages that brought tokens

    def served(self) -> Served:
        """As `core.protocol.slo` counts it."""
        return Served(self.arrived, self.first, self.last, self.tokens, self.slo, self.ended, self.ok)


@dataclass(slots=True)
class Counts:
    """Of a whole run; times in milliseconds.

    interference_ms: by slice, its step's time less the cost model's for it alone
    prices: what verdicts said a draft token costs; evicted: sessions that lost their KV to others
    events: where `traced`, (what, second, ms, slices or device, tokens)
    """

    tokens: int = 0
    steps: int = 0
    slices: int = 0
    rows: int = 0
    prefill_rows: int = 0
    drafts: int = 0
    draft_rows: int = 0
    accepted: int = 0
    busy_ms: float = 0.0
    drafting_ms: float = 0.0
    wasted_ms: float = 0.0
    ahead_wasted: int = 0
    interference_ms: list[float] = field(default_factory=list)
    prices: list[float] = field(default_factory=list)
    evicted: int = 0
    traced: bool = False
    events: list[tuple[str, float, float, int, int]] = field(default_factory=list)

    def note(self, what: str, at: float, ms: float, who: int, tokens: int) -> None:
        """Something that a trace shows. To be asked only where `traced`."""
        self.events.append((what, at, ms, who, tokens))


class Uplink(Protocol):
    """What devices see of a verifier. `senders`: what takes a connection's messages."""

    senders: dict[int, Callable[[Verdict | Refused], None]]

    def receive(self, connection: int, message: Open | Draft | Cancel) -> None: ...

    def lost(self, connection: int) -> None: ...


class Cloud:
    """Does for `core.verify.verifier.Verifier` what `wisp.server.host` does, on simulated time."""

    def __init__(
        self,
        env: Timeline,
        engine: EmulatedTarget,
        batching: str,
        admission: Admission,
        cost: Coefficients | None,
        counts: Counts,
        seed: int,
        *,
        drafter_ms: float = 0.0,
        forecast: bool = False,
    ) -> None:
        info = engine.info
        limits = Limits(
            info.n_vocab, info.eos, info.slots, info.slot_tokens, info.kv_tokens, info.step_tokens, MAX_DRAFT,
            forecast=forecast,
        )  # fmt: skip
        self.env = env
        self.engine = engine
        self.counts = counts
        self.drafter_ms = drafter_ms
        self.verifier = Verifier(limits, batching_policy(batching), admission, CostModel(cost))
        self.senders: dict[int, Callable[[Verdict | Refused], None]] = {}
        self._noise = random.Random(seed)
        self._tick_due = False
        self._timer = 0  # the number of what is to wake it

    def receive(self, connection: int, message: Open | Draft | Cancel) -> None:
        """A message arrives."""
        self._feed(FromEdge(connection, "", message))

    def lost(self, connection: int) -> None:
        """A connection is known to be gone."""
        self._feed(EdgeLost(connection))

    def _feed(self, event: InEvent) -> None:
        verifier = self.verifier
        for action in verifier.handle(self.env.now, event):
            if isinstance(action, Send):
                message = action.message
                if isinstance(message, Verdict):
                    self.counts.prices.append(message.price)
                sender = self.senders.get(action.connection)
                if sender is not None:
                    sender(message)
            elif isinstance(action, Run):
                self._run(action)
            elif isinstance(action, WakeAt):
                self._wake_at(action.at)
        if not (verifier.running or self._tick_due or isinstance(event, Tick)):
            self._tick_due = True
            self.env.after(0.0, self._tick)

    def _tick(self) -> None:
        self._tick_due = False
        if not self.verifier.running:
            self._feed(Tick())

    def _wake_at(self, at: float) -> None:
        self._timer = timer = self._timer + 1
        self.env.after(max(0.0, at - self.env.now), lambda: self._woken(timer))

    def _woken(self, timer: int) -> None:
        if timer == self._timer and not self._tick_due:
            self._tick()

    def _run(self, step: Run) -> None:
        self._timer += 1  # what was to wake it need not
        slices, profile, counts = step.slices, self.engine.profile, self.counts
        load = load_of(slices)
        ms = profile.noisy(profile.step_ms(load), self._noise)
        drafts = [s.n_draft for s in slices if s.n_draft]
        if self.drafter_ms and drafts:  # a drafter beside the target, on the same accelerator
            ms += max(drafts) * (self.drafter_ms + 0.01 * len(drafts))
        counts.steps += 1
        counts.slices += len(slices)
        counts.rows += load.new
        counts.prefill_rows += sum(len(s.tokens) - s.n_draft - 1 for s in slices)
        counts.drafts += len(drafts)
        counts.draft_rows += sum(drafts)
        counts.busy_ms += ms
        results = self.engine.verify(slices)
        counts.accepted += sum(r.accepted for r in results)
        counts.tokens += sum(len(r.tokens) for r in results)
        alone, note = self.verifier.cost.now.ms, counts.interference_ms.append
        for s in slices:
            n, start = len(s.tokens), s.start
            note(ms - alone(Load(n, n * (start + n), start, 1)))
        counts.evicted = self.verifier.evicted
        if counts.traced:
            counts.note("step", self.env.now, ms, len(slices), load.new)
        done = StepDone(results, ms)
        self.env.after(ms / 1e3 + HOST_S, lambda: self._feed(done))


class SimDevice:
    """A device in the field: one generation at a time, a draft engine that is busy or not, a link."""

    __slots__ = (
        "_asked", "_down", "_drafting", "_inbox", "_read", "_up", "ahead", "asked", "cloud", "counts", "device",
        "drafted_ms", "drafter", "ended", "env", "gone", "index", "link", "pace", "policies", "request", "retries",
        "script", "scripts", "source",
    )  # fmt: skip

    def __init__(
        self,
        env: Timeline,
        index: int,
        device: Device,
        link: Link,
        cloud: Uplink,
        scripts: Scripts,
        policies: Policies | None,
        ahead: Ahead | None,
        counts: Counts,
        seed: int,
        ended: Callable[[SimDevice, Request], None],
        retries: int = 0,
    ) -> None:
        """retries: times that a refused request is sent again after Retry-After."""
        self.env = env
        self.index = index
        self.device = device
        self.link = link
        self.cloud = cloud
        self.scripts = scripts
        self.policies = policies
        self.ahead = ahead
        self.counts = counts
        self.ended = ended
        self.source = random.Random(seed)
        self.pace = RoundTimes()
        self.drafted_ms = 0.0
        self.asked = 0  # requests so far
        self.retries = retries
        self.gone = False
        # Of the present generation; there are none before the first one starts.
        self.script: Script
        self.drafter: Drafter
        self._read = False  # its prompt, by the drafter
        # The draft step that is running: for whom, what it will propose, and its milliseconds.
        self._drafting: tuple[Drafter, tuple[int | None, Signal], float] | None = None
        self._asked = (0.0, 0)  # when the last draft was sent, and its tokens
        self._inbox: list[tuple[float, Verdict | Refused]] = []
        self._up = self._down = 0.0  # when the last message in each direction arrives: a link keeps order
        self.request: Request | None = None
        cloud.senders[index] = self._sent

    def start(self, request: Request) -> None:
        """Begin a generation."""
        self.request = request
        self.script = self.scripts.script(request.seed)
        policy = self.policies.make(0.0) if self.policies else None
        task = Task(request.prompt, Sampling(seed=request.seed), request.max_tokens, slo=request.slo)
        self.pace = self.pace.successor()
        name = f"{self.index}:{request.seed}"
        self.drafter = Drafter(
            name.rjust(8, "."), task, policy, self.scripts.library.eos,
            ahead=self.ahead if policy else None, pace=self.pace,
        )  # fmt: skip
        self._read = False
        self._carry_out(self.drafter.connected(self.env.now * 1e3, MAX_DRAFT))
        self._go_on()

    def vanish(self) -> None:
        """Switched off in mid-sentence."""
        self.gone = True
        self.cloud.senders.pop(self.index, None)
        if self.request is not None:
            self.request.ok = False
            self.request.ended = self.env.now
            self.request = None
        self.cloud.lost(self.index)

    # --- the link

    def _carry_out(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Draft):
                self._send(action, len(action.tokens))
            elif isinstance(action, Committed):
                wasted = action.drafted - action.accepted - 1
                if wasted > 0:
                    self.counts.wasted_ms += wasted * self.device.draft_ms(self.drafted_ms / 1e3)
            elif isinstance(action, Open):
                self._send(action, len(action.draft))
            else:
                self.env.after(action.after_s, self._reopen)

    def _send(self, message: Open | Draft, drafted: int) -> None:
        now = self.env.now
        self._asked = (now, drafted)
        self._up = max(self._up, now + self.link.one_way_ms(self.source) / 1e3)
        self.env.after(self._up - now, lambda: None if self.gone else self.cloud.receive(self.index, message))

    def _reopen(self) -> None:
        if self.request is not None:
            self._carry_out(self.drafter.connected(self.env.now * 1e3, MAX_DRAFT))

    def _sent(self, message: Verdict | Refused) -> None:
        now = self.env.now
        self._down = max(self._down, now + self.link.one_way_ms(self.source) / 1e3)
        self.env.after(self._down - now, lambda: self._heard(message))

    def _heard(self, message: Verdict | Refused) -> None:
        if self.gone or self.request is None or message.session != self.drafter.session:
            return
        now = self.env.now
        if isinstance(message, Verdict):
            self._seen(self.request, message)
            if self.counts.traced:
                asked, n = self._asked
                self.counts.note("wait", asked, (now - asked) * 1e3, self.index, n)
            self._asked = (now, 0)
        self._inbox.append((now * 1e3, message))
        if self._drafting is None:
            self._go_on()

    def _seen(self, request: Request, verdict: Verdict) -> None:
        """The user sees tokens as they arrive."""
        tokens, now = verdict.base + len(verdict.tokens), self.env.now
        if tokens > request.tokens:
            if request.tokens == 0:
                request.first = now
            else:
                request.gaps_ms.append((now - request.last) * 1e3)
            request.last, request.tokens = now, tokens
        if verdict.finish:
            request.ended = now

    # --- the loop of an edge: verdicts first, then the draft engine

    def _go_on(self) -> None:
        drafter = self.drafter  # another, once this one's answer is complete: that has gone on by itself
        while self._inbox and self.request is not None:
            arrived, message = self._inbox.pop(0)
            self._take(arrived, message)
        if self.request is not None and drafter.wants_token(self.env.now * 1e3):
            self._draft()

    def _take(self, arrived: float, message: Verdict | Refused) -> None:
        drafter, request, now = self.drafter, self.request, self.env.now * 1e3
        assert request is not None
        try:
            if isinstance(message, Refused):
                actions = drafter.refused(message)
            else:
                actions = drafter.verdict(now, message, arrived)
        except RequestError as error:
            request.refusals += 1
            pause = error.retry_after or 1.0
            if error.retry_after and request.refusals <= self.retries:
                self.request = None
                self.env.after(pause, lambda: self._again(request))
                return
            request.ok, request.refused, request.ended = False, True, self.env.now
            self._finish(request, pause)
            return
        if actions:
            self._carry_out(actions)
        if drafter.phase is DONE:
            self._finish(request, 0.0)

    def _again(self, request: Request) -> None:
        """Its user has waited as long as the refusal said."""
        if self.gone:
            request.ok, request.ended = False, self.env.now
        else:
            self.start(request)

    def _finish(self, request: Request, pause: float) -> None:
        self.counts.ahead_wasted += self.drafter.wasted
        self.pace = self.drafter.pace
        self.request = None
        self._inbox.clear()
        if pause:
            self.env.after(pause, lambda: self.ended(self, request))
        else:
            self.ended(self, request)

    def _draft(self) -> None:
        """A draft step. What it will propose is known at its start, and said at its end."""
        drafter, guesses = self.drafter, len(self.drafter.chain)
        ms = self.device.draft_ms(self.drafted_ms / 1e3)
        if not self._read:  # the drafter reads the prompt first
            ms += ms * len(drafter.task.prompt) / READ_AHEAD
            self._read = True
        self.drafted_ms += ms
        if self.counts.traced:
            self.counts.note("draft", self.env.now, ms, self.index, guesses + 1)
        self._drafting = (drafter, self.script.propose(len(drafter.committed), guesses) or NOTHING, ms)
        self.env.after(ms / 1e3, self._drafted)

    def _drafted(self) -> None:
        assert self._drafting is not None
        drafter, (token, signal), ms = self._drafting
        self._drafting = None
        self.counts.drafting_ms += ms
        if self.request is None:
            return
        if drafter is self.drafter and not self.gone:
            now = self.env.now * 1e3
            actions = drafter.proposed(now, token, signal, ms)
            if actions:
                self._carry_out(actions)
            if not self._inbox:
                if drafter.wants_token(now):
                    self._draft()
                return
        self._go_on()


NOTHING: tuple[int | None, Signal] = (None, Signal())
READ_AHEAD = 20.0  # prompt tokens that a drafter reads in the time of one draft step
