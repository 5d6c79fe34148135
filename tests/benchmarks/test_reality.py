"""The replay against reality: the tiny pair on a real edge, a real socket and a real verifier process.

A drafter's logits depend a little on the shape of the batch they come from, and a recorder's batches are wide. So
traces are chosen that have no call closer than that `NOISE`: in all others, everything is held to be equal.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import wisp.engines
from benchmarks.reality.distance import DelayedLine, PacedDraft
from benchmarks.reality.edge import Edge, Proposed, verifier
from feeding import FullDrafter, FullStory, Told, fed_back
from wisp.calibrate.traces import Trace
from wisp.calibrate.traces.format import as_signal
from wisp.calibrate.traces.prompts import Prompt
from wisp.calibrate.traces.record import Recording, Settings
from wisp.core.draft.policies import Ahead, Policies
from wisp.core.draft.signals import Signal
from wisp.core.protocol.messages import MAX_DRAFT
from wisp.engines.base import DraftEngine
from wisp.engines.build import read_predictor
from wisp.engines.llama.draft import LlamaDraft
from wisp.sim.devices import Device, Link, Server
from wisp.sim.replay import Bench, replay

TINY = Path(wisp.engines.__file__).parent / "data"
MAX_TOKENS = 40
# Recorded as deep as an edge can draft ahead while its verifier is held up.
SETTINGS = Settings(max_tokens=MAX_TOKENS, depth=MAX_TOKENS + MAX_DRAFT, mode="exact", group=4)
TEXTS = (
    "Tell me a story about Belomi.",
    "What happened at the river?",
    "Write code to sort a lamp.",
    "Make a list for Tavoku.",
    "Hello",
    "Who lives near the hill?",
    "Count to ten.",
    "Yes or no?",
    "Tell me a story about Tavoku.",
    "What is a lamp?",
    "Write code to count a river.",
    "Make a list for Belomi.",
    "Say hello to Belomi.",
    "Where is the lamp?",
)
PROMPTS = [Prompt(f"p{i}", "story", "train", text) for i, text in enumerate(TEXTS)]
NOISE = 0.01  # logits: closer calls than this may go either way
PREDICTOR = read_predictor()
THRESHOLD = float(PREDICTOR.about["threshold"])
BENCH = Bench(Device("", 50.0), Link(20.0), Server("", 10.0, 0.1))


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> list[Trace]:
    """Recorded as anybody would, less those with a close call."""
    out = tmp_path_factory.mktemp("recorded")
    pair = (("tiny-target", TINY / "tiny-target.gguf"), ("tiny-draft", TINY / "tiny-draft.gguf"))
    recorded = Recording(*pair, PROMPTS, SETTINGS, out, date="2026-11-21").run()
    return [trace for trace in recorded if clearest(trace) > NOISE]


def clearest(trace: Trace) -> float:
    """By how much the closest of the drafter's choices was made, on the true path and some way off it."""
    on = [trace.signal(i).lead for i in range(len(trace))]
    off = [as_signal(trace.columns, row).lead for path in trace.off.values() for row in path.signals[:10]]
    return min(on + off)


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
    server: str, draft: DraftEngine, traces: list[Trace], policies: Policies, ahead: Ahead | None = None
) -> list[FullStory]:
    """One edge generates all that was recorded, in turn."""

    async def generate() -> list[FullStory]:
        async with Edge(server, draft, policies, ahead) as edge:
            return [await told(edge, trace) for trace in traces]

    return asyncio.run(generate())


async def told(edge: Edge, trace: Trace) -> FullStory:
    story = FullStory()
    await edge.generate(trace.prompt.tolist(), trace.sampling, limit(trace), story, FullDrafter)
    return story


def limit(trace: Trace) -> int:
    """So many tokens that the edge stops where the trace does, and that a text that ends by itself is free to."""
    return len(trace) + (MAX_DRAFT if trace.finish == "stop" else 0)


def replayed(trace: Trace, spec: str, ahead: Ahead | None = None) -> list[Told]:
    """The rounds of a replay, in which time is a model's."""
    tally = replay([trace], BENCH, Policies(spec, PREDICTOR), ahead)
    return [Told(r.base, r.drafted, r.accepted) for r in tally.rounds]


def test_the_recording_has_all_there_is_to_see(traces: list[Trace]) -> None:
    """Otherwise the agreement below would be cheap."""
    assert len(traces) >= 8
    assert {t.label for t in traces} == {"greedy", "t0.7"}
    assert {t.finish for t in traces} == {"stop", "length"}
    assert 0.5 < sum(int(t.accepted.sum()) for t in traces) / sum(map(len, traces)) < 0.9


@pytest.mark.parametrize("ahead", [None, Ahead(send=False)], ids=["", "ahead"])
@pytest.mark.parametrize("spec", ["fixed:1", "fixed:4", "fixed:8"])
def test_fixed_rounds_are_the_replays(
    server: str, draft: DraftEngine, traces: list[Trace], spec: str, ahead: Ahead | None
) -> None:
    """Drafting ahead changes when, and not what."""
    for story, trace in zip(live(server, draft, traces, Policies(spec), ahead), traces, strict=True):
        assert story.tokens == trace.target.tolist()
        assert story.finish == trace.finish
        assert story.rounds == replayed(trace, spec, ahead)


@pytest.mark.parametrize(
    ("spec", "least"), [("confidence", 0.4), ("confidence", 0.7), ("predictor", THRESHOLD)]
)
def test_rounds_that_end_at_a_threshold_are_the_replays(
    server: str, draft: DraftEngine, traces: list[Trace], spec: str, least: float
) -> None:
    """Of the traces in which no token is within 0.01 of it."""
    of = [t for t in traces if replayed(t, f"{spec}:{least - 0.01}") == replayed(t, f"{spec}:{least + 0.01}")]
    assert len(of) >= 4
    policies = Policies(f"{spec}:{least}", PREDICTOR)
    for story, trace in zip(live(server, draft, of, policies), of, strict=True):
        assert story.tokens == trace.target.tolist()
        assert story.rounds == replayed(trace, f"{spec}:{least}")


@pytest.mark.parametrize("server_mode", [False, True], ids=["", "server_mode"])
@pytest.mark.parametrize("ahead", [None, Ahead()], ids=["", "ahead"])
@pytest.mark.parametrize("spec", ["fixed:4", "predictor", "gain"])
def test_with_recorded_times_the_drafter_does_the_same_again(
    server: str, draft: DraftEngine, traces: list[Trace], spec: str, ahead: Ahead | None, server_mode: bool
) -> None:
    """Every question whether to draft, every proposal, every message and every round."""
    policies = [Policies(spec, PREDICTOR, server_mode=server_mode) for _ in range(2)]
    stories = live(server, draft, traces, policies[0], ahead)
    again = fed_back(stories, traces, policies[1], ahead)
    for story, same, trace in zip(stories, again, traces, strict=True):
        assert [blind(e) for e in same.events] == [blind(e) for e in story.events]
        for recorded, heard in zip(same.events, story.events, strict=True):
            if isinstance(recorded, Proposed) and isinstance(heard, Proposed):
                assert recorded.signal.confidence == pytest.approx(heard.signal.confidence, abs=0.01)
                assert recorded.signal.lead == pytest.approx(heard.signal.lead, abs=0.05)
        assert same.drafts == story.drafts
        assert same.rounds == story.rounds
        assert same.tokens == story.tokens == trace.target.tolist()
        assert same.finish == story.finish


def blind(event: object) -> object:
    """An event without its signal."""
    return replace(event, signal=Signal()) if isinstance(event, Proposed) else event


def test_a_distant_verifier_and_a_slow_device_change_times_alone(
    server: str, draft: DraftEngine, traces: list[Trace]
) -> None:
    """What `make bench-ahead` measures with."""
    trace = min(traces, key=len)

    async def generate() -> FullStory:
        port = int(server.rsplit(":", 1)[1])
        slow = PacedDraft(draft, 4.0)
        async with DelayedLine(port, 30.0) as line, Edge(line.url, slow, Policies("fixed:4"), None) as edge:
            return await told(edge, trace)

    story = asyncio.run(generate())
    assert story.tokens == trace.target.tolist()
    assert story.rounds == replayed(trace, "fixed:4")
    assert story.time_ms > (len(story.rounds) - 1) * 30.0
    assert min(e.took_ms for e in story.events if isinstance(e, Proposed)) >= 4.0
