"""Devices, links and verifiers for simulations: measured figures, each with its source."""

from __future__ import annotations

import difflib
import math
import random
from dataclasses import dataclass, replace

from wisp.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Device:
    """An edge. `tokens_per_s`: drafting speed of a 0.5 to 0.6 B model.

    throttle: once it has drafted for `throttle_after_s`, it slows down to this share of its speed.
    """

    name: str
    tokens_per_s: float
    source: str = ""
    throttle: float = 1.0
    throttle_after_s: float = 60.0

    def draft_ms(self, busy_s: float = 0.0) -> float:
        """One draft step, milliseconds, after `busy_s` of drafting."""
        if self.throttle != 1.0 and busy_s > self.throttle_after_s:
            return 1e3 / (self.tokens_per_s * self.throttle)
        return 1e3 / self.tokens_per_s


@dataclass(frozen=True, slots=True)
class Link:
    """A network path. Jitter is exponential on top of the round trip; a lost packet costs one retransmission."""

    rtt_ms: float
    jitter_ms: float = 0.0
    loss: float = 0.0

    def one_way_ms(self, source: random.Random) -> float:
        delay = self.rtt_ms / 2
        if self.jitter_ms:
            delay += source.expovariate(2.0 / self.jitter_ms)
        if self.loss and source.random() < self.loss:
            delay += max(200.0, 2 * self.rtt_ms)  # TCP's least retransmission timeout
        return delay


@dataclass(frozen=True, slots=True)
class Server:
    """How long a verifier takes over one session's draft: queue, fixed cost of a step, and cost per new token."""

    name: str
    step_ms: float
    token_ms: float
    queue_ms: float = 0.0
    prefill_ms: float = 100.0

    def verify_ms(self, n_draft: int) -> float:
        """Engine time of a step with so many draft tokens."""
        return self.step_ms + self.token_ms * (n_draft + 1)


_LLAMACPP = "llama.cpp, published benchmarks; see the page on devices"
DEVICES = {
    d.name: d
    for d in (
        Device("pi4", 7.9, _LLAMACPP),
        Device("pi5", 20.4, _LLAMACPP),
        Device("orin-nano-7w", 27.0, _LLAMACPP),
        Device("orin-nano-15w", 68.0, _LLAMACPP),
        Device("orin-nano-25w", 93.0, _LLAMACPP),
        Device("mac-mini-m4", 103.0, _LLAMACPP),
        Device("rtx4050-laptop", 132.0, "1 to 1.5 B model: a lower bound for 0.5 B"),
        Device("iphone-throttled", 40.0, "an assumption: loses nearly half its speed", 0.55, 20.0),
    )
}


def device(name: str) -> Device:
    """A profile by name, or tokens per second as a number; "+throttle" halves it after a minute. Raises ConfigError."""
    base, plus, option = name.partition("+")
    if plus and option != "throttle":
        raise ConfigError(f"{name!r}: the only thing to add to a device is +throttle, as in {base}+throttle")
    if base in DEVICES:
        found = DEVICES[base]
    else:
        try:
            speed = float(base)
        except ValueError:
            near = difflib.get_close_matches(base, DEVICES, 1)
            meant = f" (did you mean {near[0]}?)" if near else ""
            raise ConfigError(
                f"unknown device {name!r}{meant}; choose one of {', '.join(DEVICES)}, or a speed"
            ) from None
        if not (math.isfinite(speed) and speed > 0):
            raise ConfigError(f"{name!r}: a device drafts more than 0 tokens per second")
        found = Device(f"{speed:g} tok/s", speed)
    return replace(found, throttle=0.5) if option else found
