"""Traces: recorded on the tiny pair and held against token-by-token evaluation; the files; what is shipped."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from typer.testing import CliRunner

import wisp.engines
from wisp.calibrate.traces import COLUMNS, OffPath, Trace, TraceSet
from wisp.calibrate.traces.format import load_file, rounded, save_file
from wisp.calibrate.traces.prompts import SPLITS, Prompt, load_prompts
from wisp.calibrate.traces.record import PARTS, Recording, Settings, parse_sampling, seed_of, summary
from wisp.calibrate.traces.statistics import statistics
from wisp.cli import app
from wisp.core.draft.signals import STATISTICS, Signal, signal
from wisp.core.errors import ConfigError, ModelError
from wisp.core.protocol.sampling import Sampling, gumbels, target_token
from wisp.engines.llama.draft import LlamaDraft
from wisp.engines.llama.reference import reference_tokens

TINY = Path(wisp.engines.__file__).parent / "data"
SHIPPED = Path(__file__).parents[2] / "data"

PROMPTS = [
    Prompt("story-1", "story", "train", "Tell me a story about Belomi."),
    Prompt("story-2", "story", "test_prompts", "What happened at the river?"),
    Prompt("code-1", "code", "test_domain", "Write code to sort a lamp."),
    Prompt("list-1", "list", "train", "Make a list for Tavoku."),
    Prompt("list-2", "list", "train", "Hello"),
]
SETTINGS = Settings(max_tokens=48, depth=8, mode="exact", group=2)
NOISE = (
    0.02  # logits; batches of other shapes round differently, and closer calls than this may go either way
)


def recording(out: Path, settings: Settings = SETTINGS, prompts: list[Prompt] = PROMPTS) -> Recording:
    target, draft = TINY / "tiny-target.gguf", TINY / "tiny-draft.gguf"
    if not (target.is_file() and draft.is_file()):
        pytest.skip("the tiny pair is not there")
    return Recording(
        ("tiny-target", target), ("tiny-draft", draft), prompts, settings, out, date="2026-11-21"
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished recording."""
    out = tmp_path_factory.mktemp("recorded")
    recording(out).run()
    return out


@pytest.fixture(scope="module")
def recorded(folder: Path) -> TraceSet:
    return TraceSet.load(folder)


# --- what is recorded


def test_every_prompt_is_there_under_every_sampling(recorded: TraceSet) -> None:
    assert Counter((t.prompt_id, t.label) for t in recorded) == Counter(
        (p.id, label) for p in PROMPTS for label in SETTINGS.samplings
    )
    by_id = {p.id: p for p in PROMPTS}
    assert all((t.domain, t.split) == (by_id[t.prompt_id].domain, by_id[t.prompt_id].split) for t in recorded)
    assert {t.sampling.temperature for t in recorded} == {0.0, 0.7}
    assert len({t.sampling.seed for t in recorded}) == len(recorded)


def test_the_targets_text_is_the_reference_decoders(recorded: TraceSet) -> None:
    eos = recorded.headers[0]["eos"]
    assert recorded.headers[0]["engine"]["mode"] == "exact"
    for trace in recorded:
        expected = reference_tokens(
            TINY / "tiny-target.gguf", trace.prompt.tolist(), trace.sampling, SETTINGS.max_tokens, eos
        )
        assert trace.target.tolist() == expected
        assert trace.finish == ("stop" if expected[-1] in eos else "length")


def test_a_fast_recording_differs_from_plain_decoding_in_near_ties_only(tmp_path: Path) -> None:
    fast = recording(tmp_path, Settings(max_tokens=24, depth=2)).run()
    limit = 4 * fast.headers[0]["engine"]["flip_gap"]
    for trace in fast:
        gaps: list[float] = []
        expected = reference_tokens(
            TINY / "tiny-target.gguf",
            trace.prompt.tolist(),
            trace.sampling,
            len(trace),
            fast.headers[0]["eos"],
            gaps=gaps,
        )
        same = [a == b for a, b in zip(expected, trace.target.tolist(), strict=False)]
        assert all(same) or gaps[same.index(False)] < limit


def test_proposals_and_signals_are_those_of_the_draft_engine(recorded: TraceSet) -> None:
    engine = LlamaDraft(TINY / "tiny-draft.gguf", slots=2, slot_tokens=256, threads=1)
    compared = off_path = ties = 0
    for number, trace in enumerate(recorded):
        text, session = [*trace.prompt.tolist(), *trace.target.tolist()], str(number)
        for i in range(len(trace)):
            compared += 1
            context = text[: trace.n_prompt + i]
            if not _agrees(engine, session, context, i, trace, int(trace.draft[i]), trace.signals[i]):
                ties += 1
            elif i in trace.off:
                off_path += _follow(engine, session, [*context, int(trace.draft[i])], i, trace)
        engine.forget(session)
    engine.close()
    assert compared == recorded.positions
    assert off_path > 100
    assert ties <= 0.02 * compared


def _follow(engine: LlamaDraft, session: str, context: list[int], i: int, trace: Trace) -> int:
    """Compares the off-path continuation up to the first tie; how many tokens that was."""
    tokens, signals = trace.off[i]
    for j, token in enumerate(tokens.tolist()):
        if not _agrees(engine, session, context, i + 1 + j, trace, token, signals[j]):
            return j
        context = [*context, token]
    return len(tokens)


def _agrees(
    engine: LlamaDraft,
    session: str,
    context: list[int],
    position: int,
    trace: Trace,
    token: int,
    values: Any,
) -> bool:
    """Does the engine propose `token`, with these statistics? False for a near-tie that went the other way."""
    proposal = engine.propose(session, context, position, trace.sampling)
    assert proposal is not None
    if proposal.token != token:
        assert values[COLUMNS.index("lead")] < NOISE
        return False
    names = STATISTICS
    live = np.array([getattr(proposal.signal, name) for name in names])
    assert np.allclose(live, [values[COLUMNS.index(name)] for name in names], rtol=0.02, atol=0.01)
    return True


def test_each_rejection_has_its_continuation(recorded: TraceSet) -> None:
    check_off_paths(recorded)


def check_off_paths(traces: TraceSet) -> None:
    """Each as long as `depth`, or ended by an end-of-sequence token, and by the first."""
    eos, depth = set(traces.headers[0]["eos"]), traces.headers[0]["settings"]["depth"]
    for trace in traces:
        assert sorted(trace.off) == np.flatnonzero(trace.target != trace.draft).tolist()
        assert not trace.accepted[list(trace.off)].any()
        assert not eos & set(trace.target[:-1].tolist())
        assert (int(trace.target[-1]) in eos) == (trace.finish == "stop")
        for position, (tokens, signals) in trace.off.items():
            assert signals.shape == (len(tokens), len(COLUMNS))
            assert not eos & set(tokens[:-1].tolist())
            if int(trace.draft[position]) in eos:
                assert len(tokens) == 0
            elif len(tokens) < depth:
                assert int(tokens[-1]) in eos


def test_a_trace_gives_signals_as_policies_take_them(recorded: TraceSet) -> None:
    trace = recorded.traces[0]
    fields = dict(zip(trace.columns, map(float, trace.signals[3]), strict=True))
    assert trace.signal(3) == msgspec.structs.replace(Signal(), **{name: fields[name] for name in STATISTICS})


def test_the_header_says_where_a_trace_comes_from(recorded: TraceSet) -> None:
    for header in recorded.headers:
        assert header["target"]["name"] == "tiny-target"
        assert header["draft"]["file"] == "tiny-draft.gguf"
        assert len(header["target"]["sha256"]) == len(header["vocabulary"]) == 64
        assert header["settings"]["depth"] == SETTINGS.depth
        assert header["date"] == "2026-11-21"
        assert "/" not in header["target"]["file"]


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.5])
def test_statistics_are_what_they_say(temperature: float) -> None:
    random = np.random.default_rng(5)
    for position in range(20):
        logits = (3 * random.normal(size=400)).astype(np.float32)
        sampling = Sampling(temperature=temperature, seed=position)
        token = target_token(logits, sampling, position)
        got = dict(zip(COLUMNS, statistics(logits, token, sampling, position), strict=True))
        p = np.exp(logits.astype(np.float64) - logits.max())
        p = np.sort(p / p.sum())[::-1]
        noisy = logits + temperature * gumbels(sampling.seed, position, np.arange(400))
        expected = {
            **{name: getattr(signal(logits, token, sampling, position), name) for name in STATISTICS},
            "second": p[1],
            "third": p[2],
            "collision": np.square(p).sum(),
            "peak": logits.max() - logits.mean(),
            "lead": noisy[token] - np.delete(noisy, token).max(),
        }
        assert got == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_names_of_samplings() -> None:
    assert parse_sampling("greedy", 3) == Sampling(seed=3)
    assert parse_sampling("t0.7", 3) == Sampling(temperature=0.7, seed=3)
    for wrong in ("", "t", "t0", "0.7", "t-1", "tnan", "warm"):
        with pytest.raises(ConfigError, match="sampling"):
            parse_sampling(wrong, 0)
    assert seed_of(0, "a", "greedy") != seed_of(1, "a", "greedy") != seed_of(1, "b", "greedy")


# --- interruption


def test_an_interrupted_recording_ends_in_the_same_files(folder: Path, tmp_path: Path) -> None:
    def interrupt(what: str, share: float) -> None:
        if "group 2" in what:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recording(tmp_path).run(interrupt)
    assert len(list((tmp_path / PARTS).glob("*.npz"))) == 1
    assert not list(tmp_path.glob("*.npz"))

    seen: list[str] = []
    recording(tmp_path).run(lambda what, share: seen.append(what))
    assert not any("group 1" in what for what in seen)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {
        p.name: p.read_bytes() for p in folder.iterdir()
    }


def test_a_finished_recording_is_left_alone(folder: Path) -> None:
    seen: list[str] = []
    assert len(recording(folder).run(lambda what, share: seen.append(what))) == 2 * len(PROMPTS)
    assert not seen
    with pytest.raises(ConfigError, match="choose another --out"):
        recording(folder, Settings(max_tokens=8, depth=6, group=2)).run()
    assert len(TraceSet.load(folder)) == 2 * len(PROMPTS)


def test_a_drafter_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        Recording(
            ("a", TINY / "tiny-target.gguf"), ("b", Path(__file__)), PROMPTS[:1], SETTINGS, tmp_path
        ).run()


def test_the_command_line(tmp_path: Path) -> None:
    recording(tmp_path)  # skips where the tiny pair is not there
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"id": "1", "domain": "story", "split": "train", "text": "Tell me a story."}\n')
    command = ["trace", "--target", "tiny-target", "--draft", "tiny-draft", "--prompts", str(prompts)]
    options = ["--out", str(tmp_path / "out"), "--max-tokens", "12", "--samplings", "t1.0", "--offline"]
    result = CliRunner().invoke(app, [*command, *options, "--threads", "1", "--json"])
    assert result.exit_code == 0, result.output
    about = json.loads(result.stdout)
    assert about["traces"] == 1
    assert about["positions"] == TraceSet.load(tmp_path / "out" / "story.t1.0.npz").positions == 12
    assert about == summary(TraceSet.load(tmp_path / "out"), tmp_path / "out")
    shown = CliRunner().invoke(app, [*command, *options, "--threads", "1"])
    assert "12 positions of 1 prompts" in shown.stdout


# --- files


def some_trace(seed: int = 0) -> Trace:
    random = np.random.default_rng(seed)
    target = np.array([5, 6, 7, 8], np.int32)
    draft = np.array([5, 9, 7, 1], np.int32)
    signals = rounded(random.random((4, 2), np.float32))
    off = {
        1: OffPath(np.array([3, 4], np.int32), rounded(random.random((2, 2), np.float32))),
        3: OffPath(np.empty(0, np.int32), np.empty((0, 2), np.float32)),
    }
    sampling = Sampling(temperature=0.7, seed=2**52 + 1)
    prompt = np.array([1, 2, 3], np.int32)
    about = (f"p{seed}", "d", "train", "t0.7", sampling, "length")
    return Trace(*about, prompt, target, draft, signals, off, ("confidence", "entropy"))


HEADER = {"columns": ["confidence", "entropy"]}


def test_a_file_gives_back_what_was_saved(tmp_path: Path) -> None:
    save_file(tmp_path / "a.npz", HEADER, [some_trace(0), some_trace(1)])
    save_file(tmp_path / "b.npz", HEADER, [some_trace(2)])
    loaded = TraceSet.load(tmp_path)
    assert [t.prompt_id for t in loaded] == ["p0", "p1", "p2"]
    assert loaded.positions == 12
    for got, saved in zip(loaded, map(some_trace, range(3)), strict=True):
        assert got.sampling == saved.sampling
        for name in ("prompt", "target", "draft", "signals", "accepted"):
            assert np.array_equal(getattr(got, name), getattr(saved, name))
        assert list(got.off) == [1, 3]
        for i in (1, 3):
            assert np.array_equal(got.off[i].tokens, saved.off[i].tokens)
            assert np.array_equal(got.off[i].signals, saved.off[i].signals)
    assert len(loaded.select(split="train", domain="d", label="t0.7")) == 3
    assert len(loaded.select(label="greedy")) == 0


def test_rounding_is_finer_than_anyone_needs() -> None:
    values = np.exp(np.linspace(-80, 80, 10_001)).astype(np.float32)
    assert np.max(np.abs(rounded(values) / values - 1)) <= 2**-15
    assert rounded(np.array([0.0, 1.0, -3.5], np.float32)).tolist() == [0.0, 1.0, -3.5]


def rewritten(path: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> None:
    """The file again, after `change(header, arrays)`."""
    with np.load(path) as archive:
        arrays: dict[str, Any] = dict(archive)
    header = json.loads(arrays.pop("header").tobytes())
    change(header, arrays)
    whole = io.BytesIO()
    np.savez(whole, header=np.frombuffer(json.dumps(header).encode(), np.uint8), **arrays)
    path.write_bytes(whole.getvalue())


DAMAGE: dict[str, Callable[[dict[str, Any], dict[str, Any]], Any]] = {
    "format": lambda header, arrays: header.update(format="wisp.trace.v9"),
    "shape": lambda header, arrays: arrays.update(target=arrays["target"][1:]),
    "off_length has shape": lambda header, arrays: arrays.update(draft=arrays["target"]),
    "off_token has shape": lambda header, arrays: arrays.update(
        off_length=arrays["off_length"] + np.uint8(1)
    ),
    "signals has shape": lambda header, arrays: header.update(columns=["confidence"]),
    "has type": lambda header, arrays: arrays.update(draft=arrays["draft"].astype(np.int64)),
    "not a number": lambda header, arrays: arrays["signals"].__setitem__((0, 0), np.nan),
    "unknown split": lambda header, arrays: header["traces"][0].update(split="all"),
    "damaged": lambda header, arrays: arrays.pop("off_signals"),
    "Object arrays": lambda header, arrays: arrays.update(draft=np.array([{}], object)),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_a_file_that_is_wrong_is_refused(tmp_path: Path, message: str) -> None:
    path = tmp_path / "a.npz"
    save_file(path, HEADER, [some_trace()])
    rewritten(path, lambda header, arrays: None)
    assert len(TraceSet.load(path)) == 1
    rewritten(path, DAMAGE[message])
    with pytest.raises(ConfigError, match=message) as caught:
        load_file(path)
    assert str(path) in str(caught.value)


def test_files_that_are_no_traces(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="wisp trace"):
        TraceSet.load(tmp_path)
    with pytest.raises(ConfigError, match="cannot read"):
        TraceSet.load(tmp_path / "none.npz")
    path = tmp_path / "a.npz"
    save_file(path, HEADER, [some_trace()])
    whole = path.read_bytes()
    for wrong in (b"", b"text", whole[: len(whole) // 2], whole[:200] + bytes(200) + whole[400:]):
        path.write_bytes(wrong)
        with pytest.raises(ConfigError, match="not a usable trace file"):
            load_file(path)


def test_files_of_other_columns_are_not_mixed(tmp_path: Path) -> None:
    save_file(tmp_path / "a.npz", HEADER, [some_trace()])
    save_file(tmp_path / "b.npz", {"columns": ["entropy", "margin"]}, [some_trace()])
    with pytest.raises(ConfigError, match="other columns"):
        TraceSet.load(tmp_path)


# --- prompts


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "no prompts"),
        ('{"id": "1"}', "line 1"),
        ('\n{"id": "1", "domain": "d", "split": "train", "text": "x", "extra": 1}', "line 2"),
        ('{"id": "1", "domain": "d", "split": "all", "text": "x"}', "split is one of"),
        ('{"id": "1", "domain": "d", "split": "train", "text": " "}', "needs a text"),
        ('{"id": "1", "domain": "../d", "split": "train", "text": "x"}', "a domain of letters"),
        ('{"id": "1", "domain": "d", "split": "train", "text": "x"}\n' * 2, "two prompts"),
        (
            '{"id": "1", "domain": "d", "split": "train", "text": "x"}\n'
            '{"id": "2", "domain": "d", "split": "test_domain", "text": "x"}',
            "held out",
        ),
    ],
)
def test_prompts_that_cannot_be_used(tmp_path: Path, lines: str, message: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(lines)
    with pytest.raises(ConfigError, match=message):
        load_prompts(path)
    with pytest.raises(ConfigError, match="cannot read prompts"):
        load_prompts(tmp_path / "none.jsonl")


# --- what is shipped


@pytest.fixture(scope="module")
def shipped() -> TraceSet:
    return TraceSet.load(SHIPPED / "traces" / "qwen2.5-coder")


def test_shipped_traces_are_many_and_small(shipped: TraceSet) -> None:
    assert shipped.positions >= 25_000
    assert len({t.prompt_id for t in shipped}) >= 200
    assert {t.label for t in shipped} == {"greedy", "t0.7"}
    assert len(shipped) == 2 * len({t.prompt_id for t in shipped})
    files = list((SHIPPED / "traces").rglob("*"))
    assert sum(f.stat().st_size for f in files) < 6e6
    assert len({header["plan"] for header in shipped.headers}) == 1


def test_shipped_traces_are_of_the_shipped_prompts(shipped: TraceSet) -> None:
    prompts = {p.id: p for p in load_prompts(SHIPPED / "prompts")}
    assert len({p.text for p in prompts.values()}) == len(prompts) >= 220
    assert {t.prompt_id for t in shipped} == set(prompts)
    assert all(
        (t.domain, t.split) == (prompts[t.prompt_id].domain, prompts[t.prompt_id].split) for t in shipped
    )


def test_shipped_splits_keep_domains_and_prompts_apart(shipped: TraceSet) -> None:
    parts = [shipped.select(split=split) for split in SPLITS]
    train, same_domains, other_domains = ({t.prompt_id for t in part} for part in parts)
    assert not train & same_domains
    assert not (train | same_domains) & other_domains
    assert {t.domain for t in parts[0]} == {t.domain for t in parts[1]}
    assert not {t.domain for t in parts[0]} & {t.domain for t in parts[2]}
    assert {t.domain for t in parts[2]} == {"summarise", "shell_sql"}
    assert 0.15 < len(same_domains) / (len(train) + len(same_domains)) < 0.25


def test_shipped_traces_are_plausible(shipped: TraceSet) -> None:
    accepted = np.concatenate([t.accepted for t in shipped])
    assert 0.6 < accepted.mean() < 0.95
    assert {t.finish for t in shipped} == {"stop", "length"}
    check_off_paths(shipped)
    confidence = np.concatenate([t.signals[:, COLUMNS.index("confidence")] for t in shipped])
    assert confidence[accepted].mean() > confidence[~accepted].mean() + 0.2
    assert all(0 <= values <= 1.0001 for values in (confidence.min(), confidence.max()))
    for header in shipped.headers:
        assert header["target"]["name"] == "qwen2.5-coder-1.5b"
        assert header["columns"] == list(COLUMNS)
        assert header["settings"]["depth"] == 16
