"""The replay against reality: the tiny pair on a real edge, a real socket and a real verifier process."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

import wisp.engines
from wisp.core.drafting import Ahead, Policies
from wisp.engines.base import DraftEngine
from wisp.engines.build import read_predictor
from wisp.engines.llama.draft import LlamaDraft
from wisp.lab.devices import Device, Link, Server
from wisp.lab.reality import Edge, PacedDraft, Proposed, Story, Told, fed_back, verifier
from wisp.lab.replay import Bench, replay
from wisp.lab.traces import Trace
from wisp.lab.traces import format as trace_format
from wisp.lab.traces.prompts import Prompt
from wisp.lab.traces.record import Recording, Settings

TINY = Path(wisp.engines.__file__).parent / "data"
MAX_TOKENS = 96
SETTINGS = Settings(max_tokens=MAX_TOKENS, depth=16, mode="exact", group=2)
PROMPTS = [
    Prompt("story-1", "story", "train", "Tell me a story about Belomi."),
    Prompt("story-2", "story", "train", "What happened at the river?"),
    Prompt("code-1", "story", "train", "Write code to sort a lamp."),
    Prompt("list-1", "story", "train", "Make a list for Tavoku."),
    Prompt("short-1", "story", "train", "Hello"),
    Prompt("short-2", "story", "train", "Who lives near the hill?"),
]
PREDICTOR = read_predictor()
BENCH = Bench(Device("", 50.0), Link(20.0), Server("", 10.0, 0.1))


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Trace]]:
    """Of both samplings, without the rounding that makes files small: near a threshold it would decide."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace_format, "rounded", lambda values: values)
        pair = [(name, TINY / f"{name}.gguf") for name in ("tiny-target", "tiny-draft")]
        out = tmp_path_factory.mktemp("recorded")
        yield list(Recording(*pair, PROMPTS, SETTINGS, out, date="2026-11-21").run())


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with verifier() as child:
        yield child.url


@pytest.fixture(scope="module")
def draft() -> Iterator[DraftEngine]:
    engine = LlamaDraft(TINY / "tiny-draft.gguf", threads=1)
    yield engine
    engine.close()


def live(
    server: str, draft: DraftEngine, traces: list[Trace], policies: Policies, ahead: Ahead | None
) -> list[Story]:
    """One edge generates all that was recorded, in turn."""

    async def generate() -> list[Story]:
        async with Edge(server, draft, policies, ahead) as edge:
            return [await edge.generate(t.prompt.tolist(), t.sampling, MAX_TOKENS) for t in traces]

    return asyncio.run(generate())


def policies(spec: str, *, server_mode: bool = False) -> Policies:
    return Policies(spec, PREDICTOR, server_mode=server_mode)


def test_the_recording_has_all_there_is_to_see(traces: list[Trace]) -> None:
    """Otherwise the agreement below would be cheap."""
    assert {t.label for t in traces} == {"greedy", "t0.7"}
    assert {t.finish for t in traces} == {"stop", "length"}
    assert 0.3 < sum(int(t.accepted.sum()) for t in traces) / sum(map(len, traces)) < 0.97


@pytest.mark.parametrize("ahead", [None, Ahead()], ids=["", "ahead"])
@pytest.mark.parametrize("spec", ["fixed:1", "fixed:4", "fixed:8", "confidence:0.4", "predictor"])
def test_rounds_without_a_clock_are_the_replays(
    server: str, draft: DraftEngine, traces: list[Trace], spec: str, ahead: Ahead | None
) -> None:
    """These policies look at tokens alone; and for them drafting ahead changes when, not what."""
    if spec == "predictor" and ahead is not None:
        return  # its history is of verdicts, and guesses ahead are judged before the verdict is there
    stories = live(server, draft, traces, policies(spec), ahead)
    assert [s.tokens for s in stories] == [t.target.tolist() for t in traces]
    assert [s.finish for s in stories] == [t.finish for t in traces]
    tally = replay(traces, BENCH, policies(spec), ahead)
    rounds = [Told(r.base, r.drafted, r.accepted) for r in tally.rounds]
    assert [r for s in stories for r in s.rounds] == rounds


@pytest.mark.parametrize("server_mode", [False, True], ids=["", "server_mode"])
@pytest.mark.parametrize("ahead", [None, Ahead()], ids=["", "ahead"])
@pytest.mark.parametrize("spec", ["gain", "predictor"])
def test_with_recorded_times_the_drafter_does_the_same_again(
    server: str, draft: DraftEngine, traces: list[Trace], spec: str, ahead: Ahead | None, server_mode: bool
) -> None:
    """Every question whether to draft, every proposal, every message and every round."""
    stories = live(server, draft, traces, policies(spec, server_mode=server_mode), ahead)
    again = fed_back(stories, traces, policies(spec, server_mode=server_mode), ahead)
    for story, same, trace in zip(stories, again, traces, strict=True):
        assert same.events == story.events
        assert same.drafts == story.drafts
        assert same.rounds == story.rounds
        assert same.tokens == story.tokens == trace.target.tolist()
        assert same.finish == story.finish
