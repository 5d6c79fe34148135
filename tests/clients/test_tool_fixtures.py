"""The fixtures of `canitoolcall`: what models of nine families have written, and what a parser is to make of it.

Each is read at once, character by character and in random pieces; a fixture passes if every check of the package does.
The failures are those of docs/compatibility.md, and no others.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from canitoolcall import checks, fixtures
from canitoolcall.adapters.base import ReplayInput
from canitoolcall.results import Observation, ParseResult, Status, StreamAccumulator

from wisp.api.tools.events import Reasoning, Text, Tool
from wisp.api.tools.families import PARSERS
from wisp.api.tools.markup import Markup, Parser

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
FAMILIES = {
    "qwen3-hermes": "hermes",
    "qwen3-xml": "qwen-xml",
    "glm": "glm",
    "mistral": "mistral",
    "gemma4": "gemma4",
    "gpt-oss": "harmony",
}
ALL = [
    (slug, f) for slug in sorted(fixtures.load_families()) for f in fixtures.load_fixtures(families=[slug])
]


def family(slug: str, model: str) -> str:
    """Our family for a fixture's, which has models of several formats."""
    if slug == "llama":
        return "llama4" if "Llama-4" in model else "llama3"
    if slug == "kimi":
        return "kimi-k3" if "K3" in model else "kimi-k2"
    if slug == "deepseek":
        return "dsml" if "V3.2" in model or "V4" in model else "deepseek"
    return FAMILIES[slug]


def parsed(parser: Parser, pieces: list[str], cut: bool) -> ParseResult:
    found = StreamAccumulator()
    for event in [e for piece in pieces for e in parser.feed(piece)] + parser.end(cut=cut):
        if isinstance(event, Text):
            found.add_content(event.text)
        elif isinstance(event, Reasoning):
            found.add_reasoning(event.text)
        else:
            found.append_tool_call(event.name, event.arguments)
    return found.result()


def pieces(text: str, seed: int) -> Iterator[str]:
    source, at = random.Random(seed), 0
    while at < len(text):
        size = source.randint(1, 24)
        yield text[at : at + size]
        at += size


def status(slug: str, fixture: fixtures.Fixture) -> Status:
    known = fixtures.load_family(slug)
    raw = ReplayInput.from_fixture(fixture, known)
    parser = PARSERS[family(slug, raw.model)]
    functions = [t.get("function", t) for t in fixture.tools]
    tools = {f["name"]: Tool(f["name"], f.get("parameters") or {}) for f in functions}
    pairs = parser.thinks if issubclass(parser, Markup) else ()
    prompt = (raw.generation_prompt or "").rstrip()
    thinking = any(prompt.endswith(opener.rstrip()) for opener, _ in pairs)
    ways = {"token": list(raw.text), **{f"rand:{s}:8": list(pieces(raw.text, s)) for s in range(1, 6)}}
    streams = {name: parsed(parser(tools, thinking), way, raw.truncated) for name, way in ways.items()}
    whole = parsed(parser(tools, thinking), [raw.text], raw.truncated)
    return checks.case_status(checks.run_checks(fixture, known, Observation(whole, streams)))


def test_all_fixtures_are_there() -> None:
    assert len(ALL) == 469


@pytest.mark.parametrize(("slug", "fixture"), ALL, ids=[f.id for _, f in ALL])
def test_a_fixture_passes_or_is_listed(slug: str, fixture: fixtures.Fixture) -> None:
    listed = f"`{fixture.id}`" in PAGE.read_text(encoding="utf-8")
    assert (status(slug, fixture) is Status.PASS) != listed
