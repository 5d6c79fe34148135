"""What compiling a grammar may cost, whatever it is: the system ends what takes more processor time or memory."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import signal
import subprocess
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from wisp.core.errors import GrammarBusyError, GrammarError
from wisp.core.protocol.constraints import MOST_SOURCE, Grammar
from wisp.engines import grammar_trial
from wisp.engines.grammar_trial import IDLE, Trials, Words
from wisp.engines.grammars import Grammars
from wisp.engines.plain import PlainTokenizer

BYTES = Words(257, [256], {i: bytes([i]) for i in range(256)} | {256: b"\xff<|end|>"})
SMALL_S = 0.3  # of a processor: what is refused takes seconds to minutes


@pytest.fixture(scope="module")
def trials() -> Iterator[Trials]:
    made = Trials(cpu_s=SMALL_S)
    yield made
    made.close()


def schema(value: Any) -> Grammar:
    return Grammar("json_schema", json.dumps(value))


def objects(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


def nested(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        value = {"type": "array", "items": value}
    return value


LONG = [f"[ab]*a[ab]{{{n}}}" for n in range(1, 30)]
PERIODS = (7, 11, 13, 17, 19, 23, 29, 31)
ENDLESS = {
    "multiples that hold together": schema(
        {"type": "integer", "allOf": [{"multipleOf": 9973}, {"multipleOf": 9967}]}
    ),
    "multiples of one of several parts": schema(
        {"type": "integer", "multipleOf": 9973, "anyOf": [{"multipleOf": 9967}, {"multipleOf": 7}]}
    ),
    "multiples of two names of a property": schema(
        {"properties": {"ab": {"multipleOf": 9973}}, "patternProperties": {"^a": {"multipleOf": 9967}}}
    ),
    "a multiple of many digits": schema({"type": "integer", "multipleOf": 9_999_991}),
    "many multiples": schema(
        objects(**{f"a{i}": {"type": "integer", "multipleOf": 9000 + i} for i in range(500)})
    ),
    "expressions that hold together": Grammar("lark", "start: T\nT: " + " & ".join(f"/{x}/" for x in LONG)),
    "periods that hold together": Grammar(
        "lark", "start: T\nT: " + " & ".join(f"/((..){{{p}}})*/" for p in PERIODS)
    ),
    "a schema in a grammar": Grammar(
        "lark", 'start: %json {"type": "integer", "allOf": [{"multipleOf": 9973}, {"multipleOf": 9967}]}'
    ),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_what_would_be_compiled_for_long_is_ended_and_the_cause_named(trials: Trials, name: str) -> None:
    grammar = ENDLESS[name]
    named = "&" if grammar.kind == "lark" and "%json" not in grammar.source else "multipleOf"
    with pytest.raises(GrammarError, match=rf"takes more than .* to compile; it has .*{named}"):
        trials.run(BYTES, grammar)


WORDS = ["".join(random.Random(i).choices("abcdefgh", k=9)) for i in range(4500)]
LARGE = {
    "a long repetition": schema({"type": "string", "pattern": "^[ab]{1,100000}$"}),
    "repetitions in repetitions": Grammar("regex", "(((a{1,100}){1,100}){1,100}){1,100}"),
    "a language whose automaton is exponential": Grammar("regex", ".*a.{2000}"),
    "a long string": schema({"type": "string", "minLength": 99_999, "maxLength": 1_000_000}),
    "long arrays of long arrays": schema(
        {"type": "array", "minItems": 10_000, "items": {"type": "array", "minItems": 10_000}}
    ),
    "a large enum": schema({"enum": WORDS}),
    "many choices": Grammar("choice", json.dumps(WORDS)),
    "many properties that may be left out": schema(
        {"type": "object", "properties": {f"key{i}": {"type": "integer"} for i in range(1500)}}
    ),
    "many parts": schema({"allOf": [{"type": "string", "minLength": i} for i in range(1000)]}),
    "references that double": schema(
        {"$ref": "#/$defs/a0"}
        | {
            "$defs": {f"a{i}": {"anyOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 2} for i in range(25)}
            | {"a25": {}}
        }
    ),
    "patterns of properties": schema({"patternProperties": {f"^{x}.*{x}$": {} for x in "abcdefgh"}}),
    "patterns in separate properties": schema(
        objects(**{f"p{i}": {"type": "string", "pattern": f"^{i}$"} for i in range(20)})
    ),
    "ten formats": schema(
        {"anyOf": [{"type": "string", "format": f} for f in ("date-time", "uri", "email")]}
    ),
    "a deep schema": schema(nested(100)),
}


@pytest.mark.parametrize("name", LARGE)
def test_what_looks_large_and_is_not_is_taken(name: str) -> None:
    assert len(LARGE[name].source) <= MOST_SOURCE
    Grammars(PlainTokenizer()).compile(LARGE[name])


def test_the_memory_of_compiling_is_bounded() -> None:
    few = Trials(cpu_s=60.0, most_bytes=8 << 20)
    try:
        with pytest.raises(
            GrammarError, match="takes more than 8 MiB of memory to compile; it has multipleOf"
        ):
            few.run(BYTES, ENDLESS["multiples that hold together"])
        assert few.run(BYTES, Grammar("regex", "a+")) < 8 << 20
    finally:
        few.close()


def test_a_lower_limit_of_the_operators_refuses_nothing_by_itself() -> None:
    trials = Trials(most_bytes=1 << 40)
    try:
        trials.run(BYTES, Grammar("regex", "a+"))
        [worker] = trials._idle
        resource.prlimit(worker.pid, resource.RLIMIT_DATA, (1 << 30, 1 << 30))
        trials.run(BYTES, Grammar("regex", "b+"))
    finally:
        trials.close()


def test_a_worker_goes_on_after_what_it_had_to_end(trials: Trials) -> None:
    with pytest.raises(GrammarError, match="takes more than"):
        trials.run(BYTES, ENDLESS["a multiple of many digits"])
    [worker] = trials._idle
    assert trials.run(BYTES, Grammar("regex", "abc")) >= 0
    with pytest.raises(GrammarError, match="unclosed"):
        trials.run(BYTES, Grammar("regex", "(a"))
    assert trials._idle == [worker]
    assert worker.poll() is None


def test_a_vocabulary_is_its_own(trials: Trials) -> None:
    """Control tokens have other numbers in another one."""
    other = Words(300, [299], {i: bytes([i]) for i in range(256)} | {299: b"\xff<|fin|>"})
    trials.run(other, Grammar("lark", 'start: "a" <[299]>'))
    trials.run(other, Grammar("lark", 'start: "a" <|fin|>'))
    with pytest.raises(GrammarError):
        trials.run(BYTES, Grammar("lark", 'start: "a" <|fin|>'))


def test_a_worker_that_was_killed_is_replaced() -> None:
    trials = Trials()
    try:
        trials.run(BYTES, Grammar("regex", "a"))
        [worker] = trials._idle
        os.kill(worker.pid, signal.SIGKILL)
        worker.wait()
        trials.run(BYTES, Grammar("regex", "a"))
        [other] = trials._idle
        assert other.pid != worker.pid
    finally:
        trials.close()


def test_where_no_process_can_be_had_the_grammar_is_not_to_blame(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> subprocess.Popen[bytes]:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(grammar_trial, "_started", none)
    with pytest.raises(GrammarBusyError, match=r"no process .*temporarily unavailable.*try again"):
        Trials().run(BYTES, Grammar("regex", "a"))


def test_a_worker_that_says_nothing_is_ended_with_all_that_it_has_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It takes no processor time, and its child holds the pipe."""
    stuck: list[subprocess.Popen[bytes]] = []

    def started() -> subprocess.Popen[bytes]:
        worker = subprocess.Popen(
            ["sh", "-c", "sleep 100000 & wait"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        stuck.append(worker)
        return worker

    monkeypatch.setattr(grammar_trial, "_started", started)
    trials = Trials(wall_s=0.05)
    with pytest.raises(GrammarBusyError, match="no process"):
        trials.run(BYTES, Grammar("regex", "a"))
    [worker] = stuck
    assert worker.returncode == -signal.SIGKILL
    assert not trials._idle


def test_nobody_waits_twice_for_workers_that_say_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    workers: list[subprocess.Popen[bytes]] = []
    start = grammar_trial._started

    def started() -> subprocess.Popen[bytes]:
        workers.append(start())
        return workers[-1]

    monkeypatch.setattr(grammar_trial, "_started", started)
    trials = Trials()
    trials.run(BYTES, Grammar("regex", "a"))
    os.kill(workers[0].pid, signal.SIGSTOP)  # idle, and it does not wake up
    monkeypatch.setattr(trials, "_wall_s", 0.05)
    with pytest.raises(GrammarBusyError, match="it said nothing"):
        trials.run(BYTES, Grammar("regex", "a"))
    assert len(workers) == 1


def test_one_that_takes_long_holds_up_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker is busy until it is told to go on; others are tried meanwhile, and a few workers stay."""
    started, begun, trials = grammar_trial._started, threading.Event(), Trials()
    held: list[subprocess.Popen[bytes]] = []

    def stopped() -> subprocess.Popen[bytes]:
        worker = started()
        if not held:
            os.kill(worker.pid, signal.SIGSTOP)
            held.append(worker)
            begun.set()
        return worker

    monkeypatch.setattr(grammar_trial, "_started", stopped)
    slow = threading.Thread(target=trials.run, args=(BYTES, Grammar("regex", "slow")))
    slow.start()
    try:
        assert begun.wait(60)
        for i in range(3):
            trials.run(BYTES, Grammar("regex", f"a{i}"))
        assert slow.is_alive()
        assert len(trials._idle) == 1
    finally:
        os.kill(held[0].pid, signal.SIGCONT)
        slow.join()
    assert len(trials._idle) == IDLE
    trials.close()
    assert held[0].poll() is not None
