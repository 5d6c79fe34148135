"""docs/protocol.md lists the fields of every message, in their order."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import msgspec
import pytest

from wisp.core.protocol.constraints import Constraints, Grammar
from wisp.core.protocol.messages import Branch, EdgeMessage, ServerMessage
from wisp.core.protocol.sampling import Sampling
from wisp.core.protocol.slo import Slo
from wisp.core.protocol.step import TokenLogprob

PAGE = (Path(__file__).parent.parent / "docs" / "protocol.md").read_text()
STRUCTS = (
    *get_args(EdgeMessage), *get_args(ServerMessage), Sampling, Constraints, Grammar, Slo, TokenLogprob,
    Branch,
)  # fmt: skip


@pytest.mark.parametrize("struct", STRUCTS, ids=lambda s: s.__name__)
def test_every_field_is_documented_in_its_place(struct: type[msgspec.Struct]) -> None:
    section = re.split(r"\n##", PAGE.split(f"\n### `{struct.__name__.lower()}`\n")[1])[0]
    columns = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    assert (
        tuple(name for column in columns for name in re.findall(r"`(\w+)`", column))
        == struct.__struct_fields__
    )
