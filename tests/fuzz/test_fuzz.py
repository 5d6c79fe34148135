"""Short runs of each target; values made from nothing; and a fuzzer that finds what is planted."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuzz import running
from fuzz.base import FuzzTarget
from fuzz.mutate import LEAVES, Mutator
from fuzz.running import Part, fuzz, last_input
from fuzz.targets import TARGETS
from wisp.api import sandbox
from wisp.core.errors import ConfigError


@pytest.mark.parametrize("name", TARGETS)
def test_nothing_is_found_in_a_short_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.1)  # most hostile templates take all of it
    part = fuzz(name, TARGETS[name].quick, 1)
    assert not part.findings
    assert part.count == TARGETS[name].quick
    assert part.taken
    assert part.refused or not TARGETS[name].declared


ANYTHING = st.recursive(
    st.sampled_from(LEAVES)
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats()
    | st.text(max_size=9)
    | st.binary(max_size=9),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=20,
)  # fmt: skip
TAGS = st.sampled_from(["hello", "open", "draft", "cancel", "welcome", "verdict", "refused", "redirect"])


@settings(max_examples=60)
@given(frame=ANYTHING | st.tuples(TAGS, ANYTHING, ANYTHING, ANYTHING, ANYTHING).map(list))
def test_frames_from_nothing(frame: Any) -> None:
    TARGETS["frames"].reader(Path())(msgspec.msgpack.encode(frame))


@settings(max_examples=40)
@given(
    body=st.dictionaries(
        st.sampled_from(sorted({*TARGETS["bodies"].examples()[0], "prompt", "input"})), ANYTHING
    )
)
def test_bodies_from_nothing(body: dict[str, Any]) -> None:
    TARGETS["bodies"].reader(Path())(msgspec.json.encode(body, enc_hook=str))


# --- the fuzzer itself


class Defects:
    """A reader of small lists with a defect of each kind."""

    def __init__(self) -> None:
        self.leak: list[bytes] = []

    def __call__(self, data: bytes) -> None:
        value = msgspec.msgpack.decode(data)
        if not isinstance(value, list):
            raise ConfigError("no list")
        if 65536 in value:
            raise KeyError("planted")
        if value[:1] == [None] and len(value) == 3:
            until = time.process_time() + 0.05
            while time.process_time() < until:
                pass


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> str:
    target = FuzzTarget(
        "planted",
        lambda: [[1, 2, 3], ["a"]],
        msgspec.msgpack.encode,
        lambda folder: Defects(),
        (ConfigError, msgspec.DecodeError),
        0,
        0,
        slow_s=0.04,
    )
    monkeypatch.setattr(running, "TARGETS", {"planted": target})
    return "planted"


def test_defects_are_found_once_each_and_from_the_same_seed_again(planted: str) -> None:
    part = fuzz(planted, 1500, 7)
    found = [finding.what for finding in part.findings]
    assert any(what.startswith("KeyError") for what in found)
    assert any(what.startswith("takes 0.") for what in found)
    assert len(found) == 2 + sum("Error" in what and "KeyError" not in what for what in found)
    assert part.taken
    assert part.refused
    again = fuzz(planted, 1500, 7)
    assert [f.input for f in again.findings if "Key" in f.what] == [
        f.input for f in part.findings if "Key" in f.what
    ]


def test_inputs_follow_from_the_seed_alone() -> None:
    def first(seed: str) -> list[bytes]:
        inputs = TARGETS["frames"].mutator(seed)
        return [inputs.input() for _ in range(200)]

    assert first("a") == first("a") != first("b")


def test_inputs_that_cannot_be_written_are_left_out() -> None:
    inputs = Mutator([[1]], msgspec.msgpack.encode, "x", spare=[1 << 70, object()])
    assert all(isinstance(inputs.input(), bytes) for _ in range(500))


def test_the_last_input_outlives_the_process(tmp_path: Path) -> None:
    with last_input(tmp_path / "last") as keep:
        keep(b"first")
        keep(b"second")
        size = int.from_bytes((tmp_path / "last").read_bytes()[:4], "little")
        assert (tmp_path / "last").read_bytes()[4 : 4 + size] == b"second"


def test_results_of_parts_are_added_up(tmp_path: Path) -> None:
    from fuzz.__main__ import add

    for seed in (1, 2):
        add(Part("frames", seed, 10, 4, 6), tmp_path / "results.json")
    parts = msgspec.json.decode((tmp_path / "results.json").read_bytes(), type=list[Part])
    assert [(p.seed, p.count) for p in parts] == [(1, 10), (2, 10)]
