"""An edge without --draft takes the largest model that fits, and says why not the others."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest

from test_link import Script, answer, say
from waiting import run
from wisp.core.errors import ModelError
from wisp.core.protocol.messages import VERSION, Welcome
from wisp.edge import finding
from wisp.edge.finding import Candidate, Loaded, choose, drafted_per_s, find_drafter
from wisp.edge.link import VerifierLink
from wisp.engines.base import DraftEngine
from wisp.engines.models import here
from wisp.engines.ngram import NgramDraft

GB = 1_000_000_000
WELCOME = Welcome(VERSION, "Qwen3-32B", "of-qwen3", 1000, [1], 2048, 16)


class Drafter(NgramDraft):
    """Any engine; knows whether it is closed."""

    closed = False

    def close(self) -> None:
        self.closed = True


def chosen(
    sizes: dict[str, float],
    *,
    memory: float | None = 100.0,
    vocabularies: dict[str, str] | None = None,
    rates: dict[str, float] | None = None,
) -> tuple[str | None, str, dict[str, Drafter]]:
    """The name taken, the reasons against the others, and what was loaded. Sizes and memory in GB."""
    loaded: dict[str, Drafter] = {}

    def load(name: str) -> Loaded:
        if name == "broken":
            raise ModelError("it is broken")
        loaded[name] = Drafter()
        return loaded[name], "of-qwen3"

    def rate(engine: DraftEngine) -> float:
        return (rates or {}).get(next(name for name, drafter in loaded.items() if drafter is engine), 50.0)

    models = {name: Candidate(name, int(size * GB)) for name, size in sizes.items()}
    free = None if memory is None else int(memory * GB)
    vocabulary = (vocabularies or {}).get
    found, passed = choose(models, WELCOME, free, lambda n: vocabulary(n, "of-qwen3"), load, rate)
    name = next((n for n, drafter in loaded.items() if found is not None and drafter is found[0]), None)
    return name, "; ".join(passed), loaded


def test_the_largest_that_fits_is_taken() -> None:
    assert chosen({"small": 0.4, "large": 1.2})[0] == "large"
    assert chosen({"small": 0.4, "large": 1.2}, memory=None)[0] == "large"


def test_another_vocabulary_will_not_do() -> None:
    name, why, loaded = chosen({"small": 0.4, "large": 1.2}, vocabularies={"large": "of-llama"})
    assert name == "small"
    assert "not large: its vocabulary is not that of Qwen3-32B; small, the largest" in why
    assert "large" not in loaded


def test_a_model_too_large_for_memory_is_not_loaded() -> None:
    name, why, loaded = chosen({"small": 0.4, "large": 1.2}, memory=1.0)
    assert name == "small"
    assert "large: it needs 1440 MB of memory, and 1000 MB are free" in why
    assert list(loaded) == ["small"]


def test_one_that_is_too_slow_is_closed_again() -> None:
    name, why, loaded = chosen({"small": 0.4, "large": 1.2}, rates={"large": 3.0})
    assert name == "small"
    assert "not large: it drafts 3.0 tokens/s here, too slow; small, the largest" in why
    assert [loaded["large"].closed, loaded["small"].closed] == [True, False]


def test_the_target_itself_giants_and_broken_files_are_passed_over() -> None:
    name, why, loaded = chosen({"/models/qwen3-32b.gguf": 0.1, "giant": 9.0, "broken": 0.2})
    assert name is None
    assert not loaded
    assert "/models/qwen3-32b.gguf: it is the target" in why
    assert "giant: 9.0 GB are too many" in why
    assert "broken: it is broken" in why


def test_advice_names_a_pull_where_one_would_help(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finding, "is_cached", lambda name: False)
    assert "`wisp pull qwen3-0.6b`" in finding._advice("Qwen3-32B")
    assert finding._advice("something-else") == ""
    monkeypatch.setattr(finding, "is_cached", lambda name: True)
    assert finding._advice("Qwen3-32B") == ""  # it is here, and was passed over


def test_models_of_both_caches_are_seen_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WISP_CACHE", str(tmp_path / "wisp"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    own, snapshot = tmp_path / "wisp" / "models", tmp_path / "hub" / "models--a--b" / "snapshots" / "1"
    for folder in (own, snapshot):
        folder.mkdir(parents=True)
    (own / "mine.gguf").write_bytes(b"GGUF...")
    (own / "no.gguf").write_bytes(b"nothing")
    (own / "mmproj-mine.gguf").write_bytes(b"GGUF...")
    (snapshot / "big-00001-of-00002.gguf").write_bytes(b"GGUF...")
    (snapshot / "theirs.gguf").write_bytes(b"GGUF...")
    (tmp_path / "hub" / "models--a--b" / "snapshots" / "2").mkdir()
    (tmp_path / "hub" / "models--a--b" / "snapshots" / "2" / "theirs.gguf").symlink_to(
        snapshot / "theirs.gguf"
    )
    found = {name: path.name for name, path in here().items() if "tiny-" not in name}
    assert sorted(found.values()) == ["mine.gguf", "theirs.gguf"]


def test_speed_is_measured_on_the_engine() -> None:
    assert drafted_per_s(NgramDraft()) == 0.0  # it has nothing to say after 1, 2, 3, ...


def test_without_a_verifier_the_edge_starts_soon_and_says_what_it_drafts_from(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert finding.START_S <= 10.0
    monkeypatch.setattr(finding, "START_S", 0.3)
    waits: list[float] = []

    def link(server: str, api_key: str | None, *, give_up_s: float) -> VerifierLink:
        waits.append(give_up_s)
        return VerifierLink(server, api_key, give_up_s=give_up_s)

    monkeypatch.setattr(finding, "VerifierLink", link)
    drafter, _ = find_drafter("http://127.0.0.1:9", None, slots=1, threads=1)
    assert waits == [0.3]
    assert drafter.name == "ngram"
    assert "no verifier at ws://127.0.0.1:9" in caplog.text
    assert "until this is started again" in caplog.text


def test_a_key_that_is_refused_is_what_the_log_speaks_of(caplog: pytest.LogCaptureFixture) -> None:
    refusal = answer(401, b"this API key is not known here", x_wisp_error="invalid_api_key")
    script = Script(say(WELCOME), answers=[refusal])

    async def scenario() -> None:
        async with script.listening() as url:
            drafter, _ = await asyncio.to_thread(find_drafter, url, "wrong", slots=1, threads=1)
            assert drafter.name == "ngram"

    with caplog.at_level(logging.WARNING, "wisp.edge"):
        run(scenario())
    (said,) = (r.getMessage() for r in caplog.records if r.name == "wisp.edge")
    assert "the verifier refused our key: this API key is not known here; set WISP_API_KEY" in said


def test_a_verifier_that_is_there_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Welcome] = []
    welcome = Welcome(VERSION, "Qwen3-32B", "of-qwen3", 1000, [1], 2048, 16, digest="d")
    script = Script(say(welcome))
    monkeypatch.setattr(finding, "here", dict)

    def choose(models: object, welcome: Welcome, *_: object) -> tuple[None, list[str]]:
        asked.append(welcome)
        return None, []

    monkeypatch.setattr(finding, "choose", choose)

    async def scenario() -> None:
        async with script.listening() as url:
            await asyncio.to_thread(find_drafter, url, None, slots=1, threads=1)

    run(scenario())
    assert asked == [welcome]
