"""The verifier behind an address is exchanged in mid-answer. Nobody reads one answer of two models."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness import (
    DRAFT,
    ENGINE,
    MODEL,
    TARGET,
    Answer,
    Cutter,
    Fleet,
    Peer,
    Process,
    Stream,
    ask,
    free_port,
    opening,
)
from waiting import eventually
from wisp.engines.models import resolve

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("tiny_pair"),
    pytest.mark.skipif(ENGINE != "llama.cpp", reason="the files that are exchanged are llama.cpp's"),
]

LONG: dict[str, Any] = {"max_tokens": 400, "ignore_eos": True}
PROMPT = "Tell me a story about Belomi."
SESSION_BYTES = 3000  # some dozens of tokens and their drafts, of 400
PATIENCE_S = 120.0  # for what a busy machine takes seconds to do


def same(path: Path) -> None:
    """The same weights in a new file."""
    replace(path, path.read_bytes())


def other(path: Path) -> None:
    """Weights that say other things, under the same name."""
    data = bytearray(path.read_bytes())
    half = len(data) // 8 * 4
    weights = np.frombuffer(data, np.float32, offset=half)
    weights *= 1.5
    replace(path, bytes(data))


def replace(path: Path, data: bytes) -> None:
    """As a download does: whoever has the file open keeps the old one."""
    new = path.with_suffix(".new")
    new.write_bytes(data)
    new.replace(path)


def target_in(folder: Path) -> Path:
    """A file that can be exchanged, of the same name in every folder."""
    folder.mkdir(exist_ok=True)
    return Path(shutil.copy(resolve(TARGET), folder / f"{MODEL}.gguf"))


class Gate(Cutter):
    """A line that breaks after `SESSION_BYTES`, and comes back only once it is led to another port."""

    def __init__(self, port: int) -> None:
        super().__init__(port, seed=0, budget=(SESSION_BYTES, SESSION_BYTES))

    async def _line(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.broken and self._budget[0] == SESSION_BYTES:
            writer.transport.abort()
        else:
            await super()._line(reader, writer)

    def lead_to(self, port: int) -> None:
        """Once it has broken, open it again, to there."""
        eventually(lambda: self.broken, PATIENCE_S)
        self._to, self._budget = port, (1 << 30, 1 << 30)


@pytest.fixture(scope="module")
def ours(tiny_pair: None, shared: Fleet) -> Process:
    """The verifier that an answer is begun by. Its tokenizer is in the cache, so that lines carry sessions alone."""
    server = shared.serve(target=str(target_in(shared.folder / "wisp")))
    assert shared.run("generate", "Hi.", "--server", server.url).returncode == 0
    return server


@pytest.fixture(scope="module")
def text(ours: Process) -> str:
    return ask(ours.url, PROMPT, **LONG).text


def verifier(shared: Fleet, name: str, change: Callable[[Path], None]) -> Process:
    path = target_in(shared.folder / name)
    change(path)
    return shared.serve(target=str(path))


@pytest.fixture(scope="module")
def equal(shared: Fleet) -> Process:
    return verifier(shared, "equal", same)


@pytest.fixture(scope="module")
def changed(shared: Fleet) -> Process:
    return verifier(shared, "changed", other)


@pytest.mark.parametrize("draft", [DRAFT, "none"])
def test_an_answer_goes_on_with_equal_weights(
    shared: Fleet, ours: Process, equal: Process, text: str, draft: str
) -> None:
    with Gate(ours.port) as line, Stream(shared.edge(line.url, draft=draft).url, PROMPT, **LONG) as s:
        line.lead_to(equal.port)
        answer = s.rest()
    assert (answer.text, answer.done) == (text, True)


@pytest.mark.parametrize("draft", [DRAFT, "none"])
def test_an_answer_ends_where_the_weights_are_others(
    shared: Fleet, ours: Process, changed: Process, text: str, draft: str
) -> None:
    with Gate(ours.port) as line:
        edge = shared.edge(line.url, draft=draft)
        with Stream(edge.url, PROMPT, **LONG) as s:
            line.lead_to(changed.port)
            answer = s.rest()
        fresh = ask(edge.url, PROMPT, **LONG)
    assert (answer.error["code"], answer.error["type"]) == ("model_changed", "server_error")
    assert "other weights" in answer.error["message"]
    assert not answer.done
    assert answer.text
    assert text.startswith(answer.text)
    assert fresh.text == ask(changed.url, PROMPT, **LONG).text != text  # a new question is the new model's


def test_an_answer_of_which_nothing_was_sent_fails_as_a_whole(
    shared: Fleet, ours: Process, changed: Process
) -> None:
    with Gate(ours.port) as line, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask, shared.edge(line.url).url, PROMPT, **LONG)
        line.lead_to(changed.port)
        answer: Answer = asked.result()
    assert (answer.status, answer.error["code"]) == (502, "model_changed")


@pytest.mark.parametrize("weights", ["equal", "changed"])
def test_wisp_generate_goes_on_with_equal_weights_alone(
    shared: Fleet, ours: Process, request: pytest.FixtureRequest, weights: str
) -> None:
    then: Process = request.getfixturevalue(weights)
    words = ("generate", PROMPT, "--raw", "--max-tokens", "400", "--temperature", "1.5", "--seed", "1")
    alone = shared.run(*words, "--server", ours.url)
    with Gate(ours.port) as line, ThreadPoolExecutor(1) as pool:
        running = pool.submit(shared.run, *words, "--server", line.url, "--draft", DRAFT)
        line.lead_to(then.port)
        said = running.result()
    assert "Traceback" not in said.stderr
    if weights == "equal":
        assert (said.returncode, said.stdout) == (0, alone.stdout)
    else:
        assert said.returncode != 0
        assert "other weights" in said.stderr
        assert alone.stdout.startswith(said.stdout.rstrip("\n"))


def test_both_ends_say_which_model_they_run(shared: Fleet, ours: Process, equal: Process) -> None:
    edge = shared.edge(ours.url, draft="none")
    digests = {p.health_body()["digest"] for p in (ours, equal, edge)}
    with Peer(ours.url) as peer:
        assert digests == {peer.welcome.digest}
    assert digests != {""}


def test_a_session_says_whose_text_it_goes_on_with(ours: Process) -> None:
    with Peer(ours.url) as peer:
        peer.say(opening("session-1", committed=[5], digest="0" * 32))
        refused = peer.refused()
        assert (refused.code, refused.fatal) == ("model_changed", True)


def test_a_replica_with_other_weights_is_not_taken_in_and_answers_stay_whole(
    fleet: Fleet, text: str, changed: Process
) -> None:
    target = target_in(fleet.folder / "fleet")
    router = fleet.serve("--replicas", "2", target=str(target), port=free_port(), ready=False)

    def replicas(state: str) -> dict[str, dict[str, Any]]:
        found = json.loads(fleet.run("replicas", "list", "--server", router.url, "--json").stdout)["replicas"]
        return {r["name"]: r for r in found if r["state"] == state or not state}

    eventually(lambda: router.health() == 200, PATIENCE_S)
    eventually(lambda: len(replicas("up")) == 2, PATIENCE_S)
    edge = fleet.edge(router.url)
    other(target)
    with Stream(edge.url, PROMPT, **LONG) as drafted, Stream(router.url, PROMPT, **LONG) as thin:
        fleet.run("replicas", "restart", "r1", "--server", router.url)
        assert [drafted.rest().text, thin.rest().text] == [text, text]
    eventually(lambda: "other weights" in replicas("")["r1"]["last_end"], PATIENCE_S)
    assert "it is not taken in" in router.log()
    assert list(replicas("up")) == ["r2"]
    fleet.run("replicas", "restart", "r2", "--server", router.url)  # now all have the new ones
    eventually(lambda: replicas("up"), PATIENCE_S)
    new = ask(changed.url, PROMPT, **LONG).text
    assert [ask(edge.url, PROMPT, **LONG).text, ask(router.url, PROMPT, **LONG).text] == [new, new]
