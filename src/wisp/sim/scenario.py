"""Scenarios: all inputs of a run, in one readable TOML file."""

from __future__ import annotations

import difflib
import math
import os
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from wisp.calibrate.hardware import measured
from wisp.calibrate.traces.format import DEFAULT, trace_folder
from wisp.core.errors import ConfigError
from wisp.core.protocol.slo import Slo
from wisp.engines.emulated import Hardware, hardware
from wisp.sim.devices import Device, Link, device

T = TypeVar("T")
MOST_DEVICES = 100_000
SHIPPED = Path(__file__).parent / "scenarios"
PATHS = ("arrivals", "traces", "hardware")  # fields that may be paths


class InvalidError(ConfigError, ValueError):
    """A value that no scenario may have. Also a ValueError, to which msgspec adds its place in the file."""


def _check(it_is_fine: bool, what: str) -> None:
    if not it_is_fine:
        raise InvalidError(what)


def _check_positive(of: msgspec.Struct, *fields: str) -> None:
    for name in fields:
        value = getattr(of, name)
        _check(0 < value < math.inf, f"{name} must be more than 0, not {value:g}")


def _check_from_0(of: msgspec.Struct, *fields: str) -> None:
    for name in fields:
        value = getattr(of, name)
        _check(0 <= value < math.inf, f"{name} must be at least 0, not {value:g}")


def _check_share(of: msgspec.Struct, *fields: str) -> None:
    for name in fields:
        value = getattr(of, name)
        _check(0 <= value <= 1, f"{name} must be at least 0 and at most 1, not {value:g}")


class SloClass(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Users with the same expectations. rate: tokens per second after the first; share: of all requests."""

    rate: float
    ttft_s: float = 3.0
    share: float = 1.0
    name: str = ""

    def __post_init__(self) -> None:
        _check_positive(self, "rate", "share")
        _check_from_0(self, "ttft_s")

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

    def __post_init__(self) -> None:
        _check_from_0(self, "rtt_ms", "jitter_ms")
        for name in ("rtt_ms", "jitter_ms"):
            _check(getattr(self, name) <= 60_000, f"{name} must be at most 60000 (a minute)")
        _check(0 <= self.loss <= 0.9, f"loss must be at least 0 and at most 0.9, not {self.loss:g}")
        _check_positive(self, "share")
        try:
            speed = device(self.device).tokens_per_s
        except ConfigError as error:
            raise InvalidError(f"device: {error}") from None
        _check(speed >= 0.01, f"device must draft at least 0.01 tokens per second, not {speed:g}")

    def build(self) -> tuple[Device, Link]:
        return device(self.device), Link(self.rtt_ms, self.jitter_ms, self.loss)


class Scenario(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The task of a system. In a file, paths are relative to the file's folder, or else to the current one.

    hardware:      profile of the verifier's engine, or a file of `wisp profile --target` (*.json)
    kv_tokens, slots, step_tokens, overlap: if other than the profile's. step_tokens: most tokens of a step, prompts'
                   chunks included (vLLM's max_num_batched_tokens)
    prompt_tokens, output_tokens: fewest and most, evenly between; the server learns an answer's end from its
                   end-of-sequence token, as it would live
    max_output:    `max_tokens` of the requests
    slo, devices:  the users, and their devices and links
    think_s:       mean pause between an answer and the device's next request (exponential)
    devices_n:     devices at work, for commands that do not search for it
    population:    pairs [second, devices]: how many are at work from then on; instead of devices_n
    arrivals_per_s: open loop: requests come by themselves at this rate, each from a device of its own
    arrivals_cv:   coefficient of variation of the times between them (gamma); 1: Poisson, more: bursts
    arrivals:      file of recorded arrivals instead, see `Arrival`
    traces, domain, acceptance: the texts of target and drafter; acceptance is a share instead of the recorded one
    as_recorded:   each request is a recorded one, prompt and answer whole, so that the recorded target says the same
    warmup_s, window_s, drain_s: only requests that arrive in the window count
    retries:       times that a refused request is sent again after Retry-After (OpenAI's SDK does so twice). It stays
                   one request, and its time to the first token counts from the first attempt
    vanish:        share of devices that are switched off in mid-sentence, at random times of the window
    profile_error: factor on the cost model that the server starts with
    seeds:         of runs, where the command line does not say; the first one where there is but one run
    """

    title: str
    hardware: str
    slo: tuple[SloClass, ...]
    devices: tuple[Kit, ...] = (Kit("100"),)
    kv_tokens: int = 0
    slots: int = 0
    step_tokens: int = 0
    overlap: float = 0.0
    prompt_tokens: tuple[int, int] = (60, 200)
    output_tokens: tuple[int, int] = (100, 300)
    max_output: int = 0
    think_s: float = 0.0
    devices_n: int = 50
    population: tuple[tuple[float, int], ...] = ()
    arrivals_per_s: float = 0.0
    arrivals_cv: float = 1.0
    arrivals: str = ""
    traces: str = str(DEFAULT)
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

    def __post_init__(self) -> None:
        _check(bool(self.slo), "slo must name at least one class of users: [[slo]] with a rate")
        _check(bool(self.devices), "devices must name at least one kind: [[devices]] with a device")
        for name in ("prompt_tokens", "output_tokens"):
            low, high = getattr(self, name)
            _check(
                1 <= low <= high,
                f"{name} must be the fewest (at least 1) and the most, as in [60, 200], not [{low}, {high}]",
            )
        _check_positive(self, "window_s", "profile_error")
        _check_from_0(self, "warmup_s", "drain_s", "think_s", "arrivals_per_s", "overlap")
        _check_from_0(self, "kv_tokens", "slots", "step_tokens", "max_output", "retries")
        _check(0.1 <= self.arrivals_cv <= 10, "arrivals_cv must be between 0.1 and 10; 1 is Poisson")
        _check(
            self.arrivals_cv == 1.0 or self.arrivals_per_s > 0,
            "arrivals_cv is of arrivals_per_s: give that, too",
        )
        _check_share(self, "acceptance", "vanish")
        _check(0.01 <= self.profile_error <= 100, "profile_error must be a factor between 0.01 and 100")
        most = max([self.devices_n, *(n for _, n in self.population)])
        _check(
            most <= MOST_DEVICES, f"{most} devices are more than {MOST_DEVICES}, the most that are simulated"
        )
        _check(self.devices_n >= 1, f"devices_n must be at least 1, not {self.devices_n}")
        loads = [name for name in ("population", "arrivals_per_s", "arrivals") if getattr(self, name)]
        _check(len(loads) < 2, f"{' and '.join(loads)} are two kinds of load: give one")
        for at, n in self.population:
            fine = math.isfinite(at) and at >= 0 and n >= 0
            _check(fine, f"population has [{at:g}, {n}]: neither the second nor the devices may be negative")
        _check(
            not self.population or any(n for _, n in self.population),
            "population has no device at any time",
        )
        _check(bool(self.seeds), "seeds must have at least one number")
        _check(len(set(self.seeds)) == len(self.seeds), "seeds must differ from each other")

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
    def joining_s(self) -> float:
        """Over how long the devices that are there from the start begin: the time of an answer and of a pause, so that
        as many ask at a time as later on, and most of the warm-up if that is less."""
        return min(self.answer_s + self.think_s, 0.8 * self.warmup_s)

    @property
    def answer_s(self) -> float:
        """Seconds that an answer takes at the pace that users expect, on average."""
        shares = sum(c.share for c in self.slo)
        token_s = sum(c.share / c.rate for c in self.slo) / shares
        return sum(self.output_tokens) / 2.0 * token_s

    @property
    def longest(self) -> int:
        """Tokens of the longest session that is made up for it."""
        return self.prompt_tokens[1] + self.most_output

    @property
    def profile(self) -> Hardware:
        """The hardware profile, as changed. Raises ConfigError."""
        if self.hardware.endswith(".json"):
            if self.overlap or self.step_tokens:
                raise ConfigError("a measured engine is as it is: leave out overlap and step_tokens")
            return measured(Path(self.hardware), self.slots, self.kv_tokens)
        found = hardware(self.hardware)
        return msgspec.structs.replace(
            found,
            kv_tokens=self.kv_tokens or found.kv_tokens,
            slots=self.slots or found.slots,
            step_tokens=self.step_tokens or found.step_tokens,
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


def arrivals_file(path: Path) -> Path:
    """`path`, or the one of that name beside the scenarios that ship."""
    return path if os.path.isfile(path) else SHIPPED / path


def recorded_arrivals(path: Path, usual: SloClass) -> Iterator[tuple[float, int, SloClass]]:
    """(second, tokens of the prompt, class) of each line of a file of arrivals, in order of time.

    A file that is not there is looked for beside the scenarios that ship. Raises ConfigError.
    """
    found = arrivals_file(path)
    try:
        text = found.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the arrivals {path}: {error}") from None
    decoder, lines = msgspec.json.Decoder(Arrival), []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            lines.append(decoder.decode(line))
        except (msgspec.DecodeError, RecursionError) as error:
            raise ConfigError(f"the arrivals {path}, line {number}: {error}") from None
        if lines[-1].at_s < 0 or lines[-1].prompt_tokens < 1 or lines[-1].rate < 0:
            raise ConfigError(
                f"the arrivals {path}, line {number}: at_s and rate must not be negative, prompt_tokens at least 1"
            )
    for arrival in sorted(lines, key=lambda arrival: arrival.at_s):
        slo = msgspec.structs.replace(usual, rate=arrival.rate) if arrival.rate else usual
        yield arrival.at_s, arrival.prompt_tokens, slo


def load_scenario(name: str) -> Scenario:
    """A scenario that ships, by name, or from a file. NAME@P is one that ships, with an overlap of P on its hardware.
    Raises ConfigError."""
    of, at, overlap = name.partition("@")
    path = SHIPPED / f"{of}.toml"  # `os.path` says no, too, where a name is too long for the system
    if not os.path.isfile(path):
        path, at = Path(name), ""
    if not os.path.isfile(path):
        shipped = ", ".join(sorted(p.stem for p in SHIPPED.glob("*.toml")))
        raise ConfigError(f"unknown scenario {name!r}; choose one of {shipped}, or give a TOML file")
    try:
        found = msgspec.toml.decode(path.read_bytes(), type=Scenario)
    except msgspec.ValidationError as error:
        raise ConfigError(f"the scenario {name}: {_explained(str(error))}") from None
    except (OSError, msgspec.DecodeError, ValueError, RecursionError) as error:
        raise ConfigError(f"cannot read the scenario {name}: {error}") from None
    if at:
        found = msgspec.structs.replace(found, hardware=f"{found.hardware.partition('@')[0]}@{overlap}")
    return _located(found, f"the scenario {name}", path.parent, PATHS)


def changed(scenario: Scenario, change: dict[str, Any], where: str, folder: Path) -> Scenario:
    """With other values, as a file has them. where: whose they are, for errors; folder: of their paths. Raises
    ConfigError."""
    try:
        found = msgspec.convert(msgspec.to_builtins(scenario) | change, Scenario)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {_explained(str(error))}") from None
    return _located(found, where, folder, [field for field in PATHS if field in change])


def _explained(error: str) -> str:
    """msgspec's complaint, with its place in front and the nearest known key."""
    what, _, where = error.partition(" - at `$.")
    where = where.rstrip("`")
    unknown = re.fullmatch(r"Object contains unknown field `(.*)`", what)
    if unknown is not None:
        table = where.partition("[")[0]
        of = {"slo": SloClass, "devices": Kit}.get(table, Scenario)
        known = of.__struct_fields__
        near = difflib.get_close_matches(unknown[1], known, 1)
        meant = f"did you mean {near[0]}? " if near else ""
        what = f"unknown key {unknown[1]}; {meant}known are {', '.join(known)}"
    return f"{where}: {what}" if where else what


def _located(scenario: Scenario, where: str, folder: Path, fields: Sequence[str]) -> Scenario:
    """With paths that are right from the current folder; those of `fields` are relative to `folder`. Raises ConfigError
    for a path that leads nowhere, and for an engine that holds no session of this length."""

    def there(field: str) -> Path:
        path = Path(getattr(scenario, field))
        return folder / path if field in fields and os.path.exists(folder / path) else path

    def wrong(field: str, what: str) -> ConfigError:
        return ConfigError(f'{where}: {field} = "{getattr(scenario, field)}": {what}')

    nowhere = "there is no such file, neither beside the scenario nor in the current folder"
    arrivals, traces, hardware_file = there("arrivals"), there("traces"), there("hardware")
    if scenario.arrivals and not os.path.isfile(arrivals_file(arrivals)):
        raise wrong("arrivals", nowhere)
    if traces != DEFAULT and not os.path.exists(trace_folder(traces)):
        raise wrong("traces", nowhere)
    found = msgspec.structs.replace(
        scenario,
        arrivals=str(arrivals) if scenario.arrivals else "",
        traces=str(traces),
        hardware=str(hardware_file) if os.path.isfile(hardware_file) else scenario.hardware,
    )
    try:
        profile = found.profile
    except ConfigError as error:
        raise wrong("hardware", str(error)) from None
    fits = min(profile.slot_tokens, profile.kv_tokens)
    if found.longest > fits and not (found.arrivals or found.as_recorded):
        raise ConfigError(
            f"{where}: a prompt and its answer may be {found.longest:,} tokens long, and the verifier "
            f"holds {fits:,} of a session: shorten prompt_tokens or output_tokens, or give it more kv_tokens"
        )
    return found
