"""An emulated accelerator: a target engine whose steps take the time that a hardware profile says.

The server cannot tell it from a real engine: slots, KV, threads and time are real; only the arithmetic is missing. A
step's time comes from first principles, not from the estimator's own formula, so that an estimator has something to
miss:

    memory  = (weights + KV of all tokens attended to) / bandwidth
    compute = (2 * parameters * tokens + attention) / arithmetic, tokens rounded up to the next captured graph size
    step    = (memory^p + compute^p)^(1/p) + launch + sequences * per sequence, then noise and stragglers

A profile may have a host time, too: what the host does for a step before the device can begin with it. Where steps
wait in a queue (`queue`), the host works on the next one while the device runs.

With p = 1 nothing overlaps (a straight line), with p -> infinity everything does (the textbook roofline). A profile
that ships has the p that published step times make likeliest, and the range that they allow (docs/results/overlap.md).
With p = 1.3 and 3 % noise, a straight line fitted to steps misses by 4 to 5 % (R2 0.99), which is what the paper's line
missed by on an A100; at p = 1.5 it would miss by 7 %, at p = 2 by 9 %. Figures made with 1.3 say so by name:
`a100-qwen3-32b@1.3`.

The text: a *script* by (seed, position), such as a recorded trace, or, without one, a hash of (prompt, seed,
position). It never depends on drafts.
"""

from __future__ import annotations

import math
import os
import random
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from wisp.core.errors import ConfigError, EngineError
from wisp.core.protocol.sampling import hash32
from wisp.core.protocol.step import Copy, Slice, SliceResult
from wisp.core.verify.cost import Load, load_of
from wisp.core.verify.events import Run, StepDone
from wisp.engines.base import EngineInfo, StepQueue
from wisp.engines.constraining import SlotTrackers, agreeing
from wisp.engines.identity import engine_digest
from wisp.engines.in_order import InOrder, OneAtATime
from wisp.engines.null import EOS as BYTE_EOS
from wisp.engines.null import N_VOCAB as BYTES
from wisp.engines.null import null_token

HARDWARE = Path(__file__).parent / "data" / "hardware"
_POSITIVE = (
    "parameters", "layers", "heads", "kv_heads", "head_dim", "bandwidth", "tflops", "kv_tokens", "weight_bytes",
    "kv_bytes", "bandwidth_share", "tflops_share", "overlap", "step_tokens", "slots", "slot_tokens",
)  # fmt: skip
Text = Callable[[int, int], int]  # (seed, position) -> token


class Hardware(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A model on an accelerator. Rates are peaks; the shares say how much of them a step gets.

    about:           where the figures come from
    parameters:      of the model, billions
    weight_bytes:    bytes per parameter
    layers, heads, head_dim: of attention (query heads); kv_heads: of keys and values
    bandwidth:       GB/s in all; bandwidth_share: of it that a step gets
    tflops:          in all; tflops_share: likewise
    overlap:         p above
    overlap_measured: the least p that measurements allow, the likeliest, the largest; overlap_source: which they are
    launch_ms:       a step's fixed overhead: launches, sampling, and the host's work where `host_ms` is 0
    sequence_ms:     overhead of each sequence
    host_ms, host_sequence_ms: of the engine's host for a step, and for each sequence in it
    kv_tokens:       room beside the weights
    graphs:          token counts for which a graph is captured; larger steps round up to multiples of the last
    noise:           standard deviation of the logarithm of a step's time
    straggle:        share of steps that take `straggle_factor` times as long
    """

    about: str
    parameters: float
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    bandwidth: float
    tflops: float
    kv_tokens: int
    weight_bytes: float = 2.0
    kv_bytes: float = 2.0
    bandwidth_share: float = 0.85
    tflops_share: float = 0.5
    overlap: float = 2.0
    overlap_measured: tuple[float, float, float] | None = None
    overlap_source: str = ""
    launch_ms: float = 2.0
    sequence_ms: float = 0.01
    host_ms: float = 0.0
    host_sequence_ms: float = 0.0
    graphs: tuple[int, ...] = (1, 2, 4, *range(8, 513, 8))
    step_tokens: int = 2048
    slots: int = 512
    slot_tokens: int = 8192
    noise: float = 0.03
    straggle: float = 0.005
    straggle_factor: float = 1.5

    @property
    def kv_token_bytes(self) -> float:
        """KV bytes of one token."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.kv_bytes

    def step_ms(self, load: Load) -> float:
        """Time of a step on the device, without noise, ms."""
        padded = self._padded(load.new)
        weights = self.parameters * 1e9 * self.weight_bytes
        moved = weights + (load.cached + load.new) * self.kv_token_bytes
        memory = moved / (self.bandwidth * 1e9 * self.bandwidth_share) * 1e3
        worked = (
            2 * self.parameters * 1e9 * padded + 4 * self.layers * self.heads * self.head_dim * load.attention
        )
        compute = worked / (self.tflops * 1e12 * self.tflops_share) * 1e3
        high, low = max(memory, compute), min(memory, compute)
        both = high * math.pow(1.0 + math.pow(low / high, self.overlap), 1.0 / self.overlap)
        return both + self.launch_ms + self.sequence_ms * load.slices

    def host_s(self, slices: int) -> float:
        """Seconds that the engine's host works for a step of so many sequences."""
        return (self.host_ms + self.host_sequence_ms * slices) / 1e3

    def noisy(self, ms: float, source: random.Random) -> float:
        """The same as it would be measured."""
        if self.noise:
            ms *= math.exp(source.gauss(0.0, self.noise))
        if self.straggle and source.random() < self.straggle:
            ms *= self.straggle_factor
        return ms

    def _padded(self, new: int) -> int:
        graphs = self.graphs
        if not graphs:
            return new
        if new <= graphs[-1]:
            return graphs[bisect_left(graphs, new)]
        return -(-new // 64) * 64


def is_hardware(name: str) -> bool:
    """Whether a profile of this name ships. NAME@P is the profile NAME with an overlap of P."""
    return name.partition("@")[0] in _shipped()


def _shipped() -> list[str]:
    return sorted(path.stem for path in HARDWARE.glob("*.toml"))


def hardware(name: str) -> Hardware:
    """A profile that ships, by name (see `is_hardware`), or from a TOML file. Raises ConfigError."""
    of, at, overlap = name.partition("@")
    if at and is_hardware(of):
        return msgspec.structs.replace(hardware(of), overlap=_overlap(name, overlap))
    path = HARDWARE / f"{name}.toml" if is_hardware(name) else Path(name)
    if not os.path.isfile(path):  # which says no, too, where we may not look, or the name is too long
        shipped = ", ".join(_shipped())
        raise ConfigError(f"unknown hardware profile {name!r}; choose one of {shipped}, or give a TOML file")
    try:
        profile = msgspec.toml.decode(path.read_bytes(), type=Hardware)
    except (OSError, msgspec.DecodeError, ValueError, RecursionError) as error:
        raise ConfigError(f"cannot read the hardware profile {path.name}: {error}") from None
    for field in _POSITIVE:
        if not 0 < getattr(profile, field) < math.inf:
            raise ConfigError(f"the hardware profile {path.name}: {field} must be more than 0, and finite")
    measured = profile.overlap_measured
    if measured is not None and not 0 < measured[0] <= measured[1] <= measured[2]:
        raise ConfigError(f"the hardware profile {path.name}: overlap_measured must be three rising numbers")
    if list(profile.graphs) != sorted(set(profile.graphs)):
        raise ConfigError(f"the hardware profile {path.name}: graphs must be in ascending order")
    return profile


def _overlap(name: str, p: str) -> float:
    """Raises ConfigError."""
    try:
        overlap = float(p)
    except ValueError:
        overlap = math.nan
    if not 0 < overlap < math.inf:
        raise ConfigError(
            f"the hardware profile {name}: after @ goes an overlap, a number above 0, as in @1.3"
        )
    return overlap


class Written(NamedTuple):
    """A target's text from elsewhere: what `Text` says, in a vocabulary of its own. `digest` is of all of it."""

    text: Text
    n_vocab: int
    eos: frozenset[int]
    digest: str


class VirtualClock:
    """Time that passes only where someone sleeps: measurements of an emulated engine without the waiting."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def now(self) -> float:
        """Seconds."""
        return self.seconds

    def sleep(self, seconds: float) -> None:
        """Let them pass."""
        self.seconds += seconds


class EmulatedTarget:
    """TargetEngine of a profile. `text` says the target's tokens; None: a hash of prompt, seed and position. `digest`
    is that of the text: the profile decides its timing alone.

    `now` and `sleep` (seconds) are the clock by which `run` takes its time. A simulator, whose time is its own, asks
    `verify` and `step_ms` instead. What a slot holds is kept as a real engine keeps its KV: a slice that builds on
    tokens that are not there fails.
    """

    def __init__(
        self,
        name: str,
        profile: Hardware,
        text: Text | None = None,
        *,
        n_vocab: int = BYTES,
        eos: frozenset[int] = frozenset({BYTE_EOS}),
        digest: str = "",
        seed: int = 0,
        now: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.profile = profile
        self.text = text
        self._now = now
        self._sleep = sleep
        self._noise = random.Random(seed)
        self.constraints = SlotTrackers()
        self._held: list[list[int]] = [[] for _ in range(profile.slots)] if text is None else []
        self._lengths = [0] * profile.slots  # tokens that each slot holds
        self._folded: dict[int, tuple[int, int, int]] = {}  # slot -> (length of prompt, seed, both folded)
        self._info = EngineInfo(
            engine="emulated",
            model=name,
            mode="exact",
            n_vocab=n_vocab,
            eos=eos,
            slots=profile.slots,
            slot_tokens=min(profile.slot_tokens, profile.kv_tokens),
            kv_tokens=profile.kv_tokens,
            step_tokens=profile.step_tokens,
            digest=engine_digest("emulated", text=digest, n_vocab=n_vocab, eos=sorted(eos)),
            notes=(f"no model: {name} emulates the timing of {profile.about}",),
        )

    @property
    def info(self) -> EngineInfo:
        """The engine's shape."""
        return self._info

    def run(self, batch: Sequence[Slice]) -> list[SliceResult]:
        """Choose tokens, and take the time a step would. Raises EngineError where two slices share a slot."""
        started = self._now()
        results = self.choose(batch)
        left = self.device_s(batch) + self.profile.host_s(len(batch))
        self._sleep(max(0.0, left - (self._now() - started)))
        return results

    def queue(self, depth: int) -> StepQueue:
        """Of a device that takes up to `depth` steps while it runs the first of them."""
        return EmulatedQueue(self, depth, self._now, self._sleep) if depth > 1 else OneAtATime(self)

    def choose(self, batch: Sequence[Slice]) -> list[SliceResult]:
        """What a step answers, in no time. Raises EngineError where two slices share a slot."""
        if len({s.slot for s in batch}) != len(batch):
            raise EngineError("two slices of one batch use the same slot")
        results = []
        for s in batch:
            problem = self._problem(s)
            result = SliceResult(s.session, error=problem) if problem else self._verify(s)
            self._settle(s, result)
            results.append(result)
        return results

    def device_s(self, batch: Sequence[Slice]) -> float:
        """Seconds that the device takes for a step this time."""
        return self.profile.noisy(self.profile.step_ms(load_of(batch)), self._noise) / 1e3

    def verify(self, batch: Sequence[Slice]) -> list[SliceResult]:
        """What `choose` answers, without a look at what slots hold."""
        return [self._verify(s) for s in batch]

    def copy(self, copy: Copy) -> None:
        """The first tokens of one slot into another."""
        if self._lengths[copy.source] < copy.tokens:
            raise EngineError(
                f"slot {copy.source} holds {self._lengths[copy.source]} tokens, not {copy.tokens}"
            )
        self._lengths[copy.target] = copy.tokens
        self._folded.pop(copy.target, None)
        if self._held:
            self._held[copy.target] = self._held[copy.source][: copy.tokens]

    def close(self) -> None:
        """There is nothing to free."""

    def _problem(self, s: Slice) -> str:
        info = self._info
        if not 0 <= s.slot < info.slots:
            return f"slot {s.slot} is none of {info.slots}"
        held = self._lengths[s.slot]
        if s.start > held:
            return f"slot {s.slot} holds {held} tokens, not {s.start}"
        if s.start + len(s.tokens) > info.slot_tokens:
            return f"{s.start + len(s.tokens)} tokens do not fit into a slot of {info.slot_tokens}"
        return ""

    def _settle(self, s: Slice, result: SliceResult) -> None:
        """A slot keeps what was fed and not rejected; one whose slice failed is empty."""
        if not 0 <= s.slot < len(self._lengths):
            return
        if result.error:
            self._lengths[s.slot] = 0
            if self._held:
                self._held[s.slot] = []
        else:
            self._lengths[s.slot] = s.start + len(s.tokens) - s.n_draft + result.accepted

    def _verify(self, s: Slice) -> SliceResult:
        return self._hashed(s) if self.text is None else self._agreeing(s, self.text, s.sampling.seed)

    def _agreeing(self, s: Slice, text: Text, seed: int) -> SliceResult:
        return agreeing(s, text, seed, self.constraints, self._info.n_vocab)

    def _hashed(self, s: Slice) -> SliceResult:
        held = self._held[s.slot]
        del held[s.start :]
        held += s.tokens
        known = self._folded.get(s.slot)
        if known is not None and s.start < known[0]:  # part of that prompt is gone
            del self._folded[s.slot]
        result = SliceResult(s.session)
        if s.sample:
            n_prompt = len(held) - s.n_draft - s.position
            result = self._agreeing(s, null_token, self._fold(s, held, n_prompt))
        if s.n_draft:
            del held[len(held) - s.n_draft + result.accepted :]
        return result

    def _fold(self, s: Slice, held: list[int], n_prompt: int) -> int:
        """Prompt and seed as one seed; worked out once for a prompt."""
        known = self._folded.get(s.slot)
        if known is None or known[:2] != (n_prompt, s.sampling.seed):
            known = (n_prompt, s.sampling.seed, fold(held[:n_prompt], s.sampling.seed))
            self._folded[s.slot] = known
        return known[2]


class EmulatedQueue:
    """StepQueue of an emulated device. `submit` takes the host's time, and `collect` waits for the device's.

    Tokens are chosen at once, since no clock decides them; they are told when the device would have them.
    """

    def __init__(
        self, target: EmulatedTarget, depth: int, now: Callable[[], float], sleep: Callable[[float], None]
    ) -> None:
        self.depth = depth
        self._target = target
        self._now = now
        self._sleep = sleep
        self._in_order = InOrder(_Choosing(target))
        self._steps: deque[tuple[float, StepDone | EngineError]] = deque()  # with the time of their end
        self._free_at = 0.0  # when the device has run all of them

    def submit(self, run: Run) -> None:
        """Takes the host's time."""
        started, batch = self._now(), run.slices
        done: StepDone | EngineError
        device_s = 0.0
        try:
            results = self._in_order.run(run)
        except EngineError as error:
            done = error
        else:
            device_s = self._target.device_s(batch)
            done = StepDone(results, device_s * 1e3, step=run.step)
        self._sleep(max(0.0, self._target.profile.host_s(len(batch)) - (self._now() - started)))
        self._free_at = max(self._free_at, self._now()) + device_s
        self._steps.append((self._free_at, done))

    def collect(self) -> StepDone:
        """Waits for the end of the oldest step."""
        ends_at, done = self._steps.popleft()
        self._sleep(max(0.0, ends_at - self._now()))
        if isinstance(done, EngineError):
            raise done
        return done


class _Choosing:
    """An emulated target that takes no time."""

    def __init__(self, target: EmulatedTarget) -> None:
        self.run = target.choose
        self.copy = target.copy


def fold(prompt: Sequence[int], seed: int) -> int:
    """One seed from a prompt and a seed."""
    for token in prompt:
        seed = hash32(seed, token, 1)
    return seed
