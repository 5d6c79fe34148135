"""SLO classes by name, and how well requests kept their targets: the same for edges and for a server's thin clients.

    [interactive]
    ttft_ms = 500
    tpot_ms = 60

A client chooses a class with the header `x-slo-class`; `x-slo-ttft-ms` and `x-slo-tpot-ms` override its targets.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec

from wisp.api.observe import RequestRecord
from wisp.api.scrape import Registry
from wisp.core.errors import ConfigError
from wisp.core.protocol.slo import LONGEST_MS, Slo, met

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_Target = Annotated[float, msgspec.Meta(ge=0, le=LONGEST_MS)]


class _Class(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    ttft_ms: _Target = 0.0
    tpot_ms: _Target = 0.0


def read_slo_classes(given: Path | str | Mapping[str, Any]) -> dict[str, Slo]:
    """Classes from a TOML file, or from the tables of one that was read already. Raises ConfigError."""
    where = "slo-classes"
    if not isinstance(given, Mapping):
        where = str(given)
        try:
            given = tomllib.loads(Path(given).read_text())
        except (OSError, ValueError, RecursionError) as error:  # tomllib raises all of these
            raise ConfigError(f"cannot read the SLO classes in {where}: {error}") from None
    classes: dict[str, Slo] = {}
    for name, table in given.items():
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"{where}: {name!r} is no name for an SLO class; take letters, digits, _ . and -"
            )
        try:
            found = msgspec.convert(table, _Class)
        except msgspec.ValidationError as error:
            raise ConfigError(f"{where}: [{name}]: {error}") from None
        if math.isnan(found.ttft_ms + found.tpot_ms):
            raise ConfigError(f"{where}: [{name}]: nan is no number of milliseconds")
        if not found.ttft_ms and not found.tpot_ms:
            raise ConfigError(f"{where}: [{name}] needs ttft_ms, tpot_ms or both")
        classes[name] = Slo(found.ttft_ms, found.tpot_ms)
    return classes


class Attainment:
    """Counters of requests that had an SLO, by class ("": targets of their own), as `core.protocol.slo` counts them."""

    def __init__(self, registry: Registry) -> None:
        self._requests = registry.counter("request_slo", "Requests that had an SLO.", "outcome", "slo_class")
        text = "Output tokens of requests that met their SLO."
        self._goodput = registry.counter("request_goodput_tokens", text, "slo_class")

    def count(self, record: RequestRecord) -> None:
        if record.slo is None:
            return
        kept = met(record.served(), record.ended)
        self._requests.add(1.0, "met" if kept else "missed", record.slo_class)
        if kept:
            self._goodput.add(record.completion_tokens, record.slo_class)
