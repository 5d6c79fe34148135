"""Scenarios: everything that moves a result, in one TOML file that a person can read."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

from wisp.core.errors import ConfigError
from wisp.core.slo import Slo
from wisp.engines.emulated import Hardware, hardware
from wisp.lab.devices import Device, Link, device
from wisp.lab.sim.profiled import measured

T = TypeVar("T")
SHIPPED = Path(__file__).parent / "scenarios"


class SloClass(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Users who expect the same. rate: tokens per second after the first; share: of all requests."""

    rate: float
    ttft_s: float = 3.0
    share: float = 1.0
    name: str = ""

    @property
    def slo(self) -> Slo:
        return Slo(self.ttft_s * 1e3, 1e3 / self.rate)


class Kit(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Devices of a kind and the link they are on. device: a profile or tokens per second; share: of all devices."""

    device: str
    rtt_ms: float = 20.0
    jitter_ms: float = 0.0
    loss: float = 0.0
    share: float = 1.0

    def build(self) -> tuple[Device, Link]:
        return device(self.device), Link(self.rtt_ms, self.jitter_ms, self.loss)


class Scenario(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is asked of a system.

    hardware:      profile of the verifier's engine, or what `wisp profile --target` wrote of one (*.json)
    kv_tokens, slots, overlap: if other than the profile's
    prompt_tokens, output_tokens: fewest and most, evenly between; the server learns an answer's end from its
                   end-of-sequence token, as it would live
    max_output:    `max_tokens` of the requests
    slo, devices:  who asks, and from where
    think_s:       mean pause between an answer and the device's next request (exponential)
    devices_n:     devices at work, for commands that do not search for it
    population:    pairs [second, devices]: how many are at work from then on; instead of devices_n
    arrivals_per_s: open loop: requests come by themselves at this rate, each from a device of its own
    arrivals:      file of recorded arrivals instead, see `Arrival`
    traces, domain, acceptance: what target and drafter say; acceptance states a share instead of the recorded one
    as_recorded:   each request is a recorded one, prompt and answer whole, so that the recorded target says the same
    warmup_s, window_s, drain_s: only requests that arrive in the window count
    retries:       times that a refused request is sent again after Retry-After (OpenAI's SDK does so twice). It stays
                   one request, and its time to the first token counts from the first attempt
    vanish:        share of devices that are switched off in mid-sentence, at random times of the window
    profile_error: factor on the cost model that the server starts with
    """

    title: str
    hardware: str
    slo: tuple[SloClass, ...]
    devices: tuple[Kit, ...] = (Kit("100"),)
    kv_tokens: int = 0
    slots: int = 0
    overlap: float = 0.0
    prompt_tokens: tuple[int, int] = (60, 200)
    output_tokens: tuple[int, int] = (100, 300)
    max_output: int = 0
    think_s: float = 0.0
    devices_n: int = 50
    population: tuple[tuple[float, int], ...] = ()
    arrivals_per_s: float = 0.0
    arrivals: str = ""
    traces: str = "data/traces"
    domain: str = ""
    acceptance: float = 0.0
    as_recorded: bool = False
    warmup_s: float = 40.0
    window_s: float = 120.0
    drain_s: float = 60.0
    retries: int = 0
    vanish: float = 0.0
    profile_error: float = 1.0
    seeds: tuple[int, ...] = (1, 2, 3)

    def at_rate(self, rate: float) -> Scenario:
        """With one class of users at this rate."""
        return msgspec.structs.replace(
            self, slo=(msgspec.structs.replace(self.slo[0], rate=rate, share=1.0),)
        )

    def with_devices(self, n: int) -> Scenario:
        """With so many devices at work all the time."""
        return msgspec.structs.replace(self, devices_n=n, population=())

    def brief(self, warmup_s: float, window_s: float, drain_s: float) -> Scenario:
        """With other times."""
        return msgspec.structs.replace(self, warmup_s=warmup_s, window_s=window_s, drain_s=drain_s)

    @property
    def profile(self) -> Hardware:
        """The hardware profile, as changed. Raises ConfigError."""
        if self.hardware.endswith(".json"):
            return measured(Path(self.hardware), self.slots, self.kv_tokens)
        found = hardware(self.hardware)
        return msgspec.structs.replace(
            found,
            kv_tokens=self.kv_tokens or found.kv_tokens,
            slots=self.slots or found.slots,
            overlap=self.overlap or found.overlap,
        )

    @property
    def open(self) -> bool:
        """Do requests come by themselves, whether or not devices have their answers?"""
        return bool(self.arrivals or self.arrivals_per_s)

    @property
    def most_output(self) -> int:
        return self.max_output or self.output_tokens[1]


def pick(source: random.Random, items: Sequence[T], shares: Sequence[float]) -> T:
    """One of the items, by share."""
    return source.choices(items, shares)[0]


class Arrival(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A line of a file of arrivals. rate: tokens per second that this user expects (0: as the scenario's first class
    says)."""

    at_s: float
    prompt_tokens: int
    rate: float = 0.0


def recorded_arrivals(path: Path, usual: SloClass) -> Iterator[tuple[float, int, SloClass]]:
    """(second, tokens of the prompt, class) of each line of a file of arrivals, in order of time.

    A file that is not there is looked for beside the scenarios that ship. Raises ConfigError.
    """
    found = path if path.is_file() else SHIPPED / path
    try:
        lines = msgspec.json.Decoder(Arrival).decode_lines(found.read_bytes())
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the arrivals {path}: {error}") from None
    for line in sorted(lines, key=lambda line: line.at_s):
        if line.at_s < 0 or line.prompt_tokens < 1 or line.rate < 0:
            raise ConfigError(
                f"the arrivals {path}: at_s and rate must not be negative, prompt_tokens at least 1"
            )
        slo = msgspec.structs.replace(usual, rate=line.rate) if line.rate else usual
        yield line.at_s, line.prompt_tokens, slo


def load_scenario(name: str) -> Scenario:
    """A scenario that ships, by name, or from a file. Raises ConfigError."""
    path = SHIPPED / f"{name}.toml"
    if not path.is_file():
        path = Path(name)
    if not path.is_file():
        shipped = ", ".join(sorted(p.stem for p in SHIPPED.glob("*.toml")))
        raise ConfigError(f"unknown scenario {name!r}; choose one of {shipped}, or give a TOML file")
    try:
        return msgspec.toml.decode(path.read_bytes(), type=Scenario)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the scenario {path.name}: {error}") from None
