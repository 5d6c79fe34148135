"""The emulated engine: text that nothing but prompt, seed and position decides, and time by a profile."""

from __future__ import annotations

import random
from pathlib import Path
from statistics import median

import msgspec
import pytest

from wisp.core.errors import ConfigError, EngineError
from wisp.core.protocol.sampling import Sampling
from wisp.core.protocol.step import Copy, Slice
from wisp.core.verify.cost import Load, load_of
from wisp.engines.build import load_target
from wisp.engines.emulated import (
    HARDWARE,
    EmulatedTarget,
    Hardware,
    VirtualClock,
    Written,
    hardware,
    is_hardware,
)

QUIET = msgspec.structs.replace(hardware("a100-qwen3-32b"), noise=0.0, straggle=0.0, slots=8)
PROMPT = list(range(40, 70))


def engine(profile: Hardware = QUIET, **options: object) -> tuple[EmulatedTarget, VirtualClock]:
    clock = VirtualClock()
    return EmulatedTarget("a100", profile, now=clock.now, sleep=clock.sleep, **options), clock  # type: ignore[arg-type]


def decoded(
    target: EmulatedTarget, n: int, *, slot: int = 0, seed: int = 5, prompt: list[int] = PROMPT
) -> list[int]:
    """The target alone, token by token."""
    sampling = Sampling(seed=seed)
    tokens = target.run([Slice(1, slot, 0, prompt, sampling=sampling)])[0].tokens
    while len(tokens) < n:
        at = len(prompt) + len(tokens) - 1
        step = Slice(1, slot, at, tokens[-1:], position=len(tokens), sampling=sampling)
        tokens += target.run([step])[0].tokens
    return tokens


def test_the_text_depends_on_prompt_and_seed_and_on_nothing_else() -> None:
    text = decoded(engine()[0], 30)
    assert decoded(engine()[0], 30, slot=6) == text
    assert decoded(engine()[0], 30, seed=6) != text
    assert decoded(engine()[0], 30, prompt=[*PROMPT[:-1], 99]) != text


@pytest.mark.parametrize("seed", range(4))
def test_drafts_good_and_bad_and_company_in_the_batch_leave_the_text_alone(seed: int) -> None:
    source = random.Random(seed)
    prompts = [[source.randrange(250) for _ in range(source.randint(3, 40))] for _ in range(4)]
    truth = [decoded(engine()[0], 60, prompt=p, seed=9) for p in prompts]
    target, _ = engine()
    sampling = Sampling(seed=9)
    chains = [list(p) for p in prompts]
    held = [0] * 4
    while min(len(c) - len(p) for c, p in zip(chains, prompts, strict=True)) < 40:
        batch, company = [], source.sample(range(4), source.randint(1, 4))
        for i in company:
            done = len(chains[i]) - len(prompts[i])
            right = truth[i][done : done + source.randint(0, 6)]
            draft = [t if source.random() < 0.8 else 255 - t for t in right]
            feed = chains[i][held[i] :]
            if len(feed) > 8 and source.random() < 0.5:  # a piece of the prompt
                cut = source.randint(1, len(feed) - 1)
                batch.append(Slice(i, i, held[i], feed[:cut], sample=False))
            else:
                batch.append(Slice(i, i, held[i], feed + draft, len(draft), True, done, sampling))
        for s, result in zip(batch, target.run(batch), strict=True):
            assert not result.error
            held[s.session] = s.start + len(s.tokens) - s.n_draft + result.accepted
            chains[s.session] += result.tokens
    for chain, prompt, text in zip(chains, prompts, truth, strict=True):
        assert chain[len(prompt) :][:60] == text[: len(chain) - len(prompt)]


def test_a_copied_prefix_goes_on_as_the_original_would() -> None:
    target, _ = engine()
    text = decoded(target, 20)
    chain = PROMPT + text
    target.copy(Copy(0, 3, len(PROMPT) + 9))
    sampling = Sampling(seed=5)
    result = target.run([Slice(2, 3, len(PROMPT) + 9, [text[9]], position=10, sampling=sampling)])[0]
    assert result.tokens == [text[10]]
    # the same slot is then taken by another session with a prompt of the same length
    other = [t + 1 for t in PROMPT]
    assert decoded(target, 20, slot=3, prompt=other) == decoded(engine()[0], 20, prompt=other)
    # a resumed one: its prompt and what was committed are fed at once
    result = target.run([Slice(3, 4, 0, chain[:-5], position=15, sampling=sampling)])[0]
    assert result.tokens == [text[15]]


def test_a_prompt_that_changed_under_a_known_length_and_seed_is_read_anew() -> None:
    """Slot 0 has answered one prompt; another of that length is fed without sampling, and then continued."""
    target, _ = engine()
    decoded(target, 3)
    other = [t + 1 for t in PROMPT]
    text = decoded(engine()[0], 4, prompt=other)
    target.run([Slice(2, 0, 0, [*other, *text[:2]], sample=False)])
    result = target.run([Slice(3, 0, len(other) + 2, [text[2]], position=3, sampling=Sampling(seed=5))])[0]
    assert result.tokens == [text[3]]


@pytest.mark.parametrize("text", [None, lambda seed, position: 7])
def test_kv_that_is_not_there_fails_the_slice_alone(text: object) -> None:
    target, _ = engine(text=text)
    good = Slice(1, 0, 0, [1, 2, 3])
    lost, far = Slice(2, 1, 5, [4]), Slice(3, 8, 0, [4])
    results = target.run([good, lost, far])
    assert results[0].error == ""
    assert results[0].tokens
    assert "slot 1 holds 0 tokens, not 5" in results[1].error
    assert "slot 8 is none of 8" in results[2].error
    assert "do not fit" in target.run([Slice(4, 2, 0, [1] * 9000)])[0].error
    with pytest.raises(EngineError, match="same slot"):
        target.run([good, good])
    with pytest.raises(EngineError, match="holds 0 tokens"):
        target.copy(Copy(5, 6, 1))


def test_rejected_tokens_are_not_in_the_slot() -> None:
    target, _ = engine(text=lambda seed, position: 7)
    result = target.run([Slice(1, 0, 0, [1, 2, 7, 7, 9, 9], n_draft=4)])[0]
    assert (result.accepted, result.tokens) == (2, [7, 7, 7])
    assert target.run([Slice(1, 0, 4, [7], position=3)])[0].error == ""
    assert "holds 5 tokens, not 6" in target.run([Slice(1, 0, 6, [7])])[0].error


def test_a_step_takes_the_time_of_its_profile() -> None:
    target, clock = engine()
    batch = [Slice(i, i, 0, [1] * 5, n_draft=4) for i in range(4)]
    target.run(batch)
    assert clock.now() * 1e3 == pytest.approx(QUIET.step_ms(load_of(batch)))
    # the weights of a 32 B model in bf16 cannot be read faster than that from an A100's memory
    assert clock.now() > 65.6e9 / 2039e9
    assert clock.now() < 0.06


def test_noise_and_stragglers_are_those_of_the_profile() -> None:
    profile = msgspec.structs.replace(QUIET, noise=0.03, straggle=0.05, straggle_factor=2.0)
    target, clock = engine(profile, text=lambda seed, position: 7)
    batch = [Slice(0, 0, 0, [1] * 5, n_draft=4)]
    alone, ratios = profile.step_ms(load_of(batch)), []
    for _ in range(2000):
        before = clock.now()
        target.run(batch)
        ratios.append((clock.now() - before) * 1e3 / alone)
    late = [r for r in ratios if r > 1.5]
    assert 0.03 < len(late) / len(ratios) < 0.07
    usual = [abs(r - 1.0) for r in ratios if r <= 1.5]
    assert 0.015 < median(usual) < 0.026  # of a normal with 3 %: 2 %


@pytest.mark.parametrize("name", [path.stem for path in sorted(HARDWARE.glob("*.toml"))])
def test_every_profile_that_ships_loads_and_makes_sense(name: str) -> None:
    profile = hardware(name)
    decode = profile.step_ms(Load(1, 100, 100, 1))
    assert 2.0 < decode < 80.0
    times = [profile.step_ms(Load(16 * n, 16 * n * 200, 16 * 200, 16)) for n in (1, 4, 16, 64)]
    assert times == sorted(times)
    assert times[0] < 1.3 * decode  # a few tokens more hide behind the weights
    assert profile.kv_tokens > 10_000
    assert profile.overlap_measured is not None
    assert profile.overlap == profile.overlap_measured[1]
    assert "docs/results/overlap.md" in profile.overlap_source


def test_a_profile_with_another_overlap_has_a_name() -> None:
    name, load = "a100-qwen3-32b", Load(64, 64 * 300, 64 * 300, 64)
    other = hardware(f"{name}@1.3")
    assert is_hardware(f"{name}@1.3")
    assert other == msgspec.structs.replace(hardware(name), overlap=1.3)
    assert other.step_ms(load) > hardware(name).step_ms(load)
    target, _ = load_target(f"{name}@1.3", engine="emulated")
    assert target.info.model == f"{name}@1.3"
    for wrong in ("", "p", "0", "-1", "nan", "inf"):
        with pytest.raises(ConfigError, match="after @ goes an overlap"):
            hardware(f"{name}@{wrong}")
    with pytest.raises(ConfigError, match=r"unknown hardware profile 'a100@1\.3'"):
        hardware("a100@1.3")


@pytest.mark.parametrize("name", ["x" * 300, "/" + "x/" * 3000, "no-such", "\0"])
def test_a_name_that_is_no_profile_is_none_whatever_the_system_says_of_it(name: str) -> None:
    assert not is_hardware(name)
    with pytest.raises(ConfigError, match="unknown hardware profile"):
        hardware(name)


def test_a_profile_of_one_s_own_and_what_may_be_wrong_with_it(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text((HARDWARE / "a100-qwen3-14b.toml").read_text() + "\nstep_tokens = 512\n")
    target, tokenizer = load_target(str(path), engine="emulated", slots=5, kv_tokens=3000)
    info = target.info
    assert (info.engine, info.model, info.slots, info.kv_tokens) == ("emulated", "mine", 5, 3000)
    assert (info.step_tokens, info.slot_tokens) == (512, 3000)
    assert tokenizer.encode("aé", add_bos=True, parse_special=False) == [97, 0xC3, 0xA9]
    for wrong, said in {
        "bandwidth = 0": "bandwidth must be more than 0",
        "bandwidth = inf": "bandwidth must be more than 0, and finite",
        "speed = 9": "unknown field `speed`",
        "graphs = [4, 2]": "graphs must be in ascending order",
        "overlap_measured = [2.0, 1.0, 3.0]": "three rising numbers",
    }.items():
        text = "\n".join(x for x in path.read_text().splitlines() if not x.startswith(wrong.split()[0]))
        path.write_text(f"{text}\n{wrong}\n")
        with pytest.raises(ConfigError, match=said):
            hardware(str(path))
        path.write_text((HARDWARE / "a100-qwen3-14b.toml").read_text())
    with pytest.raises(ConfigError, match="a100-qwen3-14b, "):
        hardware("nothing")


def test_text_from_elsewhere_is_written_in_numbers() -> None:
    written = Written(lambda seed, position: 1000 + seed + position, 2000, frozenset({1999}), "said")
    target, tokenizer = load_target("a100-qwen3-32b", engine="emulated", written=written)
    assert decoded(target, 4, seed=3) == [1003, 1004, 1005, 1006]  # type: ignore[arg-type]
    assert b"".join(map(tokenizer.piece, [1003, 17, 1999])) == b" 1003 17"
    ids = tokenizer.encode(" 1003 17x 5000", add_bos=False, parse_special=False)
    assert ids == [1003, 17, 120, *b" 5000"]
    assert (target.info.n_vocab, tokenizer.n_vocab, tokenizer.eos) == (2000, 2000, frozenset({1999}))


def test_log_probabilities_are_those_of_tokens_that_are_certain() -> None:
    target, _ = engine()
    (result,) = target.run([Slice(1, 0, 0, PROMPT, sampling=Sampling(seed=5), logprobs=3)])
    (entry,) = result.logprobs
    assert (entry.token, entry.logprob) == (result.tokens[0], 0.0)
    assert [(top.token, top.logprob) for top in entry.top] == [(entry.token, 0.0)]
    (bare,) = target.run([Slice(2, 1, 0, PROMPT, sampling=Sampling(seed=5), logprobs=0)])
    assert [e.top for e in bare.logprobs] == [[]]
