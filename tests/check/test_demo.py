"""The demo: whole on the tiny pair, and what it says when things go wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.console import Console

from wisp.check import demo
from wisp.check.comparison import Answer, Comparison, Token, measure, remark
from wisp.check.demo import run_demo
from wisp.children import Child, ChildError, Children, free_ports
from wisp.core.errors import ConfigError
from wisp.engines.models import PAIRS, is_cached

DIES_WHEN_ASKED = """
import http.server, os, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"model": "m", "mode": "exact"}')
    def do_POST(self):
        print("out of memory", flush=True)
        os._exit(3)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.fixture(autouse=True)
def logs_stay_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def answer(text: str, *, finish: str = "length", logprob: float = -0.5) -> Answer:
    tokens = [Token(c, tuple(c.encode()), logprob) for c in text]
    return Answer(tokens, [False] * len(tokens), finish, 0.1, 1.1)


def compare(edge: Answer, alone: Answer) -> Comparison:
    return Comparison("prompt", "greedy", edge, alone)


@pytest.fixture
def not_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pair "broken" whose files have the right first bytes, and nothing else."""
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF" + bytes(64))
    monkeypatch.setitem(PAIRS, "broken", (str(path), str(path)))


@pytest.mark.skipif(not is_cached("tiny-target"), reason="the tiny pair is not there")
def test_on_the_tiny_pair_every_answer_is_identical(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_demo("tiny", drafting="fixed:3", max_tokens=24, offline=True, as_json=True) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"]
    assert report["mode"] == "exact"
    assert len(report["comparisons"]) == 8
    for case in report["comparisons"]:
        assert case["identical"]
        assert case["identical_logprobs"]
        assert case["edge"]["text"] == case["alone"]["text"]
        spec = case["edge"]["speculative_decoding"]
        unseen = (
            1 if case["edge"]["finish_reason"] == "stop" else 0
        )  # an accepted end of sequence is not shown
        assert 0 <= spec["num_accepted_draft_tokens"] - case["edge"]["tokens_from_drafts"] <= unseen
    assert report["cost"]["accepted"] > 0.1
    assert len({case["edge"]["text"] for case in report["comparisons"]}) > 4


def test_a_verifier_that_cannot_start_is_quoted(not_a_model: None) -> None:
    with pytest.raises(ChildError, match=r"(?s)the verifier ended with status 2.*cannot load"):
        run_demo("broken", drafting="fixed:4", max_tokens=8, offline=True, as_json=True)


def test_a_verifier_that_dies_in_the_middle_is_quoted_and_leaves_no_process(
    not_a_model: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Child] = []

    def start(children: Children, client: httpx.Client, *_: Any) -> tuple[Child, Child, dict[str, Any]]:
        for name, port in zip(("verifier", "edge"), free_ports(2), strict=True):
            started.append(children.start(name, ["-c", DIES_WHEN_ASKED, str(port)], port))
        health = [child.wait_healthy(client) for child in started]
        return started[0], started[1], health[0]

    monkeypatch.setattr(demo, "_start", start)
    with pytest.raises(ChildError, match=r"(?s)the edge ended with status 3.*out of memory"):
        run_demo("broken", drafting="fixed:4", max_tokens=8, offline=True, as_json=True)
    assert len(started) == 2
    assert all(child.process.returncode is not None for child in started)


def test_unknown_pairs_and_policies_are_refused_before_anything_starts() -> None:
    with pytest.raises(ConfigError, match=r"there is no pair 'gpt'; choose one of: tiny"):
        run_demo("gpt", drafting="fixed:4", max_tokens=8, offline=True, as_json=True)
    with pytest.raises(ConfigError, match="drafting policy"):
        run_demo("tiny", drafting="wild", max_tokens=8, offline=True, as_json=True)


def test_the_first_difference_is_found() -> None:
    assert compare(answer("abcd"), answer("abcd")).differs_at is None
    assert compare(answer("abcd"), answer("abxd")).differs_at == 2
    assert compare(answer("abcd"), answer("ab")).differs_at == 2
    assert compare(answer("ab"), answer("ab", finish="stop")).differs_at == 2
    near = compare(answer("ab"), answer("ab", logprob=-0.5000001))
    assert (near.differs_at, near.same_logprobs) == (None, False)


def test_tokens_that_look_alike_but_have_other_bytes_differ() -> None:
    ours, theirs = answer("a"), answer("a")
    ours.tokens[0] = Token("\ufffd", (0xF0,), -1.0)
    theirs.tokens[0] = Token("\ufffd", (0xE2,), -1.0)
    assert compare(ours, theirs).verdict == "DIFFERENT at token 0"


def test_an_event_is_accepted_drafts_and_one_of_the_targets_own() -> None:
    taken = Answer()

    def event(text: str, finish: str | None = None) -> dict[str, Any]:
        entries = [{"token": c, "bytes": [ord(c)], "logprob": -1.0} for c in text]
        return {"choices": [{"logprobs": {"content": entries}, "finish_reason": finish}]}

    for events in ([event("a")], [event("bcd")], [event("ef"), event("", "stop")]):
        demo._take(taken, events, 0.5, Child("edge", "", None, Path()), lambda *_: None)  # type: ignore[arg-type]
    assert taken.text == "abcdef"
    # The last verdict ended with an end of sequence, so both of its visible tokens were drafted.
    assert taken.from_draft == [False, True, True, False, True, True]


def test_the_remark_reckons_with_what_was_measured() -> None:
    edge = answer("a" * 31)
    edge.spec = {"num_spec_steps": 10, "num_draft_tokens": 40, "num_accepted_draft_tokens": 20}
    alone = answer("a" * 31)
    edge.last = 0.1 + 10 * 0.4  # ten rounds of 400 ms
    alone.last = 0.1 + 30 * 0.12  # thirty steps of 120 ms
    cost = measure([compare(edge, alone)])
    assert (round(cost.round_ms), round(cost.step_ms), cost.committed) == (400, 120, 3.0)
    assert round(cost.speedup, 3) == 0.9
    assert "0.90 times as fast" in remark(cost)


def test_a_difference_is_shown_and_ends_with_status_1(
    not_a_model: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    child = Child("edge", "http://127.0.0.1:1", None, Path())  # type: ignore[arg-type]
    health = {"mode": "exact", "model": "m"}
    pair = [compare(answer("same"), answer("same")), compare(answer("this"), answer("that"))]
    monkeypatch.setattr(demo, "_start", lambda *_: (child, child, health))
    monkeypatch.setattr(demo, "_compare_all", lambda *_: pair)
    monkeypatch.setattr(demo, "Console", lambda **_: Console(width=100))
    assert run_demo("broken", drafting="fixed:4", max_tokens=4, offline=True, as_json=False) == 1
    shown = capsys.readouterr().out
    assert "DIFFERENT at token 2" in shown
    assert "1 of 2 answers are identical" in shown


def test_an_unknown_engine_is_named() -> None:
    with pytest.raises(
        ConfigError, match=r"no engine 'sglang' for the demo; choose one of: llama\.cpp, vllm"
    ):
        run_demo("tiny", engine="sglang", drafting="fixed:3", max_tokens=2, offline=True, as_json=True)
