"""Files of operators: keys, SLO classes, configuration, scenarios, hardware, cost profiles; and event logs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from fuzz.base import FuzzTarget, Reader, must
from fuzz.mutate import lines_of, write_lines
from fuzz.wire import EDGE_MESSAGES
from wisp.api.attainment import read_slo_classes
from wisp.api.keys import Keyring
from wisp.calibrate.profile.target import read_cost
from wisp.cli.config import _read as read_config
from wisp.core.errors import ConfigError, ModelError
from wisp.core.protocol.step import SliceResult
from wisp.core.verify.admission import KeyLimits
from wisp.core.verify.cost import Coefficients
from wisp.core.verify.events import EdgeLost, KeyLimitsChanged, Limits, Received, StepDone, Tick
from wisp.engines.emulated import HARDWARE, hardware
from wisp.server.event_log import LogHeader, read_runs
from wisp.sim.scenario import SHIPPED, load_scenario

KEYS = """# customers
[keys.alice]
secret = "open sesame"
sessions = 8
requests_per_minute = 60
tokens_per_minute = 20000

[keys."bob's"]
sha256 = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
admin = true
"""
CLASSES = "[patient]\nttft_ms = 30000\ntpot_ms = 10000\n\n[quick]\ntpot_ms = 25.5\n"
TOML_TROUBLE = (
    "a = " + "[" * 3000, "a = " + "9" * 5000, "a = " + "{b = " * 500, "[[keys]]", "[keys.alice.x]", "keys = 3",
    "x = 1979-13-01", "sessions = -1", "sessions = 1e400", "sessions = nan", 'secret = "\\ud800"',
    "secret = '\x7f'", "sessions = 9223372036854775808", "a." * 200 + "b = 1", "'' = 1", "sha256 = ''",
    "secret = 'é'",
)  # fmt: skip


def of_lines(*texts: str) -> Callable[[], list[Any]]:
    """Examples of a text format, with lines that its readers are known to trip over."""

    def examples() -> list[Any]:
        return [*(lines_of(text) for text in texts), *([line, *lines_of(texts[0])] for line in TOML_TROUBLE)]

    return examples


def of_file(name: str, read: Callable[[Path], object]) -> Callable[[Path], Reader]:
    """A reader of files: each input becomes one."""

    def made(folder: Path) -> Reader:
        path = folder / name

        def reader(data: bytes) -> None:
            path.write_bytes(data)
            try:
                read(path)
            except (ConfigError, ModelError) as error:
                text = str(error)
                must(len(text) < 20_000, f"the error has {len(text)} characters")
                raise

        return reader

    return made


def read_keys(path: Path) -> None:
    ring = Keyring(path)
    must(ring, "a file of keys lets everybody in")
    for name, limits in ring.limits.items():
        must(name.isprintable() and min(limits.sessions, limits.requests_per_minute) >= 0, f"key {name!r}")


def cost_examples() -> list[Any]:
    profiles = sorted(Path(__file__).parents[2].glob("docs/results/profile-emulated-*.json"))
    coefficients = msgspec.to_builtins(Coefficients())
    return [coefficients, *(json.loads(p.read_text()) for p in profiles)]


def scenario_examples() -> list[Any]:
    shipped = [path.read_text() for path in sorted(SHIPPED.glob("*.toml"))]
    trouble = [[line, *lines_of(shipped[0])] for line in TOML_TROUBLE]
    return [*map(lines_of, shipped), *trouble]


def hardware_examples() -> list[Any]:
    return [lines_of(path.read_text()) for path in sorted(HARDWARE.glob("*.toml"))]


LIMITS = Limits(
    n_vocab=257, eos=frozenset({256}), slots=4, slot_tokens=512, kv_tokens=2048, step_tokens=512, digest="d"
)


def log_examples() -> list[Any]:
    """Records of an event log: [length (None: as it is), [time, record]]."""
    header = LogHeader("0.2.0", "null", "null", LIMITS, "wisp", Coefficients(), 8, {"alice": KeyLimits(2)})
    events = [
        Received(1, "alice", EDGE_MESSAGES[1]),  # type: ignore[arg-type]
        Received(1, "alice", EDGE_MESSAGES[4]),  # type: ignore[arg-type]
        Tick(),
        StepDone([SliceResult(1, 0, [65])], 1.0),
        EdgeLost(1),
        KeyLimitsChanged({"alice": KeyLimits(1)}),
    ]
    records = [header, *events]
    plain_records = [
        msgspec.msgpack.decode(msgspec.msgpack.encode((float(i), r))) for i, r in enumerate(records)
    ]
    return [[[None, record] for record in plain_records]]


def write_log(value: Any) -> bytes:
    data = b""
    for length, record in value:
        written = msgspec.msgpack.encode(record)
        data += (len(written) if length is None else length & 0xFFFFFFFF).to_bytes(4, "little") + written
    return data


def read_log(path: Path) -> None:
    for header, _ in read_runs(path):
        header.verifier()


def write_json(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "replace")


def of_operators(
    name: str, examples: Callable[[], list[Any]], read: Callable[[Path], object], count: int, quick: int
) -> FuzzTarget:
    """A text file that a command is given."""
    return FuzzTarget(name, examples, write_lines, of_file("file.toml", read), (ConfigError,), count, quick)


FILES = (
    of_operators("keys", of_lines(KEYS), read_keys, 200_000, 150),
    of_operators("classes", of_lines(CLASSES), read_slo_classes, 200_000, 100),
    of_operators("config", of_lines(KEYS), read_config, 100_000, 80),
    of_operators("scenarios", scenario_examples, lambda path: load_scenario(str(path)), 100_000, 100),
    of_operators("hardware", hardware_examples, lambda path: hardware(str(path)), 100_000, 100),
    FuzzTarget(
        "costs",
        cost_examples,
        write_json,
        of_file("cost.json", read_cost),
        (ConfigError,),
        count=100_000,
        quick=100,
    ),
    FuzzTarget(
        "logs",
        log_examples,
        write_log,
        of_file("events.log", read_log),
        (ConfigError,),
        count=200_000,
        quick=200,
    ),
)
