"""A verifier in virtual time: the live `Verifier` and its loop. Steps last as the hardware profile says."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from wisp.api.pages.recorder import Recorder
from wisp.core.protocol.messages import MAX_DRAFT, Cancel, Draft, Open, Refused, Verdict
from wisp.core.protocol.step import SliceResult
from wisp.core.verify.admission import Admission
from wisp.core.verify.batching import batching_policy
from wisp.core.verify.cost import Coefficients, CostModel, load_of
from wisp.core.verify.events import EdgeLost, Ended, Limits, Received, Run, StepDone
from wisp.core.verify.loop import VerifierLoop
from wisp.core.verify.verifier import Verifier
from wisp.engines.emulated import EmulatedTarget, Hardware
from wisp.sim.timeline import Timeline

HOST_S = 2e-3  # the server's own work between steps of some 50 sequences: measured, on 2 slow cores
# The same where the engine's share is known apart (`Hardware.host_ms`): for a step, and for each sequence in it.
SERVER_S, SERVER_SEQUENCE_S = 0.3e-3, 0.02e-3


class Event(NamedTuple):
    """An interval of a trace: a step of so many sessions, or a device's draft step or wait for a verdict."""

    what: str
    at: float  # seconds
    ms: float
    tokens: int
    sessions: int = 0
    device: int = 0  # its number


@dataclass(slots=True)
class VerifierCounts:
    """A verifier's counters since its start. rows: tokens fed, of which prefill_rows are prompts'.

    interference_ms: for each slice, the time of its step less the cost model's time for the slice alone
    prices:          of a draft token, in tokens, from each verdict
    evicted:         sessions whose KV was freed for others
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
    interference_ms: list[float] = field(default_factory=list)
    prices: list[float] = field(default_factory=list)
    evicted: int = 0


class SimVerifier:
    """A verifier whose engine and clock are simulated; `core.verify.loop` drives it, as in the live server."""

    def __init__(
        self,
        env: Timeline,
        engine: EmulatedTarget,
        batching: str,
        admission: Admission,
        cost: Coefficients | None,
        seed: int,
        *,
        drafter_ms: float = 0.0,
        slo_admission: bool = False,
        depth: int = 1,
        history_tokens: int = 0,
        trace: list[Event] | None = None,
        row_s: float = 0.0,
    ) -> None:
        """drafter_ms: draft step of a drafter on the same accelerator (0: devices draft).
        row_s: width of a row of `recorder`, for the run's page (0: none)."""
        info = engine.info
        limits = Limits(
            info.n_vocab, info.eos, info.slots, info.slot_tokens, info.kv_tokens, info.step_tokens, MAX_DRAFT,
            slo_admission=slo_admission, depth=depth, history_tokens=history_tokens,
        )  # fmt: skip
        self.env = env
        self.engine = engine
        self.counts = VerifierCounts()
        self.trace = trace
        self.drafter_ms = drafter_ms
        self.verifier = Verifier(limits, batching_policy(batching), admission, CostModel(cost))
        self.senders: dict[int, Callable[[Verdict | Refused], None]] = {}
        self.soon, self.at = env.soon, env.at
        self.recorder = Recorder(self.verifier, width_s=row_s, kept=1000, live=False) if row_s else None
        self._loop = VerifierLoop(self.verifier, self, watch=self.recorder)
        self._noise = random.Random(seed)
        self._host_free_at = self._device_free_at = 0.0  # seconds

    @property
    def now(self) -> float:
        return self.env.now

    def receive(self, connection: int, message: Open | Draft | Cancel) -> None:
        self._loop.feed(Received(connection, "", message))

    def lost(self, connection: int) -> None:
        self._loop.feed(EdgeLost(connection))

    def send(self, connection: int, message: Verdict | Refused) -> None:
        if isinstance(message, Verdict):
            self.counts.prices.append(message.price)
        sender = self.senders.get(connection)
        if sender is not None:
            sender(message)

    def ended(self, ended: Ended) -> None:
        """Counted by the devices themselves."""

    def run(self, step: Run) -> None:
        """A step takes as long as the hardware profile says."""
        slices, profile, counts = step.slices, self.engine.profile, self.counts
        load = load_of(slices)
        ms = profile.noisy(profile.step_ms(load), self._noise)
        drafts = [s.n_draft for s in slices if s.n_draft]
        if self.drafter_ms and drafts:
            ms += max(drafts) * (self.drafter_ms + 0.01 * len(drafts))
        counts.steps += 1
        counts.slices += len(slices)
        counts.rows += load.new
        counts.prefill_rows += load.new - sum(drafts) - len(slices)
        counts.drafts += len(drafts)
        counts.draft_rows += sum(drafts)
        counts.busy_ms += ms
        results = self.engine.verify(slices)
        counts.accepted += sum([r.accepted for r in results])
        counts.tokens += sum([len(r.tokens) for r in results])
        alone, note = self.verifier.cost.now.ms_of, counts.interference_ms.append
        for s in slices:
            n, start = len(s.tokens), s.start
            note(ms - alone(n, n * (start + n), start, 1))
        counts.evicted = self.verifier.evicted
        if self.trace is not None:
            self.trace.append(Event("step", self.env.now, ms, load.new, sessions=len(slices)))
        host_s = host_s_of(profile, len(slices))
        if self.verifier.in_flight.depth == 1:
            done = StepDone(results, ms)
            self.env.after(ms / 1e3 + host_s, lambda: self._ended(done))
        else:
            self._queued(step, ms / 1e3, host_s, results)

    def _queued(self, step: Run, device_s: float, host_s: float, results: list[SliceResult]) -> None:
        """The host prepares one step after another, while the device runs those that are ready."""
        now = self.env.now
        self._host_free_at = max(now, self._host_free_at) + host_s
        self._device_free_at = max(self._host_free_at, self._device_free_at) + device_s
        host_ms = (self._host_free_at - now) * 1e3
        done = StepDone(results, device_s * 1e3, step=step.step, host_ms=host_ms)
        self.env.after(self._device_free_at - now, lambda: self._back(done))

    def _back(self, done: StepDone) -> None:
        """The device has run it; the host takes it in as soon as it has prepared what it is at."""
        left_s = self._host_free_at - self.env.now
        if left_s > 0.0:
            self.env.after(left_s, lambda: self._ended(done))
        else:
            self._ended(done)

    def _ended(self, done: StepDone) -> None:
        self._loop.feed(done)


def host_s_of(profile: Hardware, slices: int) -> float:
    """Seconds of the host's work for a step: the server's own, and that of the engine if the profile says it."""
    if not (profile.host_ms or profile.host_sequence_ms):
        return HOST_S
    return SERVER_S + SERVER_SEQUENCE_S * slices + profile.host_s(slices)
