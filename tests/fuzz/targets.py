"""Everything that is fuzzed, by name."""

from __future__ import annotations

from collections.abc import Mapping

from fuzz.base import FuzzTarget
from fuzz.bodies import HTTP
from fuzz.files import FILES
from fuzz.models import MODELS
from fuzz.wire import WIRE

TARGETS: Mapping[str, FuzzTarget] = {target.name: target for target in (*WIRE, *HTTP, *MODELS, *FILES)}
