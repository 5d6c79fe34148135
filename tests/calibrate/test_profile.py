"""`wisp profile --target`: from an engine to a cost model that a server starts from."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import msgspec
import pytest
from typer.testing import CliRunner

from wisp import cli
from wisp.calibrate.hardware import profiled
from wisp.calibrate.profile.grid import Cell, EngineSize, cells
from wisp.calibrate.profile.measure import Bench, Timed
from wisp.calibrate.profile.target import CostProfile, judge, read_cost, split
from wisp.core.errors import ConfigError
from wisp.core.protocol.step import Copy, Slice, SliceResult
from wisp.core.verify.cost import Coefficients, load_of
from wisp.engines.base import EngineInfo, StepQueue
from wisp.engines.constraining import SlotTrackers
from wisp.engines.emulated import HARDWARE, VirtualClock, hardware
from wisp.engines.in_order import OneAtATime

SAID = 7  # by the toy, whatever it is asked
TRUTH = Coefficients(step=8.0, token=0.7, cached=3e-4, attention=2e-4)
INFO = EngineInfo("toy", "toy", "exact", 100, frozenset({0}), 12, 600, 12 * 600, 64, "digest")


class Machine:
    """A target engine whose steps take exactly what TRUTH says, but for stragglers. It is strict about its KV."""

    def __init__(self, info: EngineInfo = INFO, straggle: float = 0.0, noise: float = 0.01) -> None:
        self.info = info
        self.constraints = SlotTrackers()
        self.clock = VirtualClock()
        self.held = [0] * info.slots
        self.straggle, self.noise = straggle, noise
        self.steps = 0
        self._random = random.Random(4)

    def run(self, batch: Sequence[Slice]) -> list[SliceResult]:
        assert len({s.slot for s in batch}) == len(batch)
        assert sum(len(s.tokens) for s in batch) <= self.info.step_tokens
        self.steps += 1
        for s in batch:
            assert s.start <= self.held[s.slot], "built on KV that is not there"
            assert not set(s.tokens) & self.info.eos
            assert s.start + len(s.tokens) <= self.info.slot_tokens
            draft = s.tokens[len(s.tokens) - s.n_draft :]
            assert draft == [SAID] * s.n_draft, (
                "a rejected draft may be cut short, and is not what was to be timed"
            )
            self.held[s.slot] = s.start + len(s.tokens)
        ms = TRUTH.ms(load_of(batch)) * (1 + self._random.gauss(0, self.noise))
        self.clock.sleep(ms / 1e3 * (5.0 if self._random.random() < self.straggle else 1.0))
        return [
            SliceResult(s.session, s.n_draft, [SAID] * (s.n_draft + 1)) if s.sample else SliceResult(0)
            for s in batch
        ]

    def queue(self, depth: int) -> StepQueue:
        return OneAtATime(self, depth)

    def copy(self, copy: Copy) -> None:
        assert self.held[copy.source] >= copy.tokens
        self.held[copy.target] = copy.tokens

    def close(self) -> None:
        pass

    @property
    def grid(self) -> list[Cell]:
        info = self.info
        return cells(EngineSize(info.step_tokens, info.slots, info.kv_tokens, info.slot_tokens))


def test_the_grid_keeps_to_what_an_engine_takes_and_has_all_kinds_of_steps() -> None:
    size = EngineSize(step_tokens=32, slots=6, kv_tokens=3000, slot_tokens=700)
    grid = cells(size)
    assert len(set(grid)) == len(grid) > 40
    for cell in grid:
        assert cell.load.new <= 32
        assert cell.slices <= 6
        assert cell.cached < 700
        assert cell.load.new + cell.slices * cell.cached <= 3000
    assert {c.sequences for c in grid} == {1, 2, 4, 6}
    assert any(c.chunk and c.sequences > 1 for c in grid)
    assert any(c.sequences == 1 and c.new == 32 for c in grid)  # a piece of a prompt
    assert len(cells(size, quick=True)) < len(grid) / 2


def test_the_coefficients_of_a_machine_are_found_through_stragglers() -> None:
    engine = Machine(straggle=0.04)
    measured = Bench(engine, now=engine.clock.now).measure(engine.grid, repeats=5, limit_s=1e9)
    assert not measured.cut_short
    assert 0.003 < measured.noise < 0.02
    profile = judge(measured, engine.info, "", None)
    c = profile.coefficients
    assert c.step == pytest.approx(TRUTH.step, rel=0.05)
    assert c.token + (c.beyond if c.knee < 20 else 0) == pytest.approx(TRUTH.token, rel=0.1)
    assert profile.fit.mape < 0.02
    assert profile.line.mape < 0.02
    assert profile.line.r2 > 0.99


def test_a_step_s_time_is_the_median_without_what_is_far_off() -> None:
    assert Timed(Cell(1, 1, 0), [10.0, 10.2, 9.9, 10.1, 55.0]).ms == pytest.approx(10.05)
    assert Timed(Cell(1, 1, 0), [7.0, 7.0, 7.0]).ms == 7.0
    assert Timed(Cell(1, 1, 0), [1.0, 5.0, 9.0]).spread > 0.25  # so it would be left out


def test_where_time_is_short_fewer_steps_are_timed_but_each_often_enough() -> None:
    engine = Machine()
    whole = Bench(engine, now=engine.clock.now).measure(engine.grid, repeats=5, limit_s=1e9)
    engine = Machine()
    short = Bench(engine, now=engine.clock.now).measure(engine.grid, repeats=5, limit_s=whole.seconds / 4)
    assert short.cut_short
    assert 12 <= len(short.steps) < len(whole.steps)
    assert min(len(t.times) for t in short.steps) >= 3
    assert short.seconds < whole.seconds / 2
    assert {t.cell.cached for t in short.steps} == {t.cell.cached for t in whole.steps}  # no level is starved
    engine = Machine()
    with pytest.raises(ConfigError, match="--limit-s"):
        Bench(engine, now=engine.clock.now).measure(engine.grid, repeats=5, limit_s=0.05)


def test_three_steps_in_ten_are_kept_apart_always_the_same() -> None:
    steps = [Timed(Cell(1, 1, i), [1.0]) for i in range(100)]
    fitted, apart = split(steps)
    assert (len(fitted), len(apart)) == (70, 30)
    assert {t.cell for t in fitted} | {t.cell for t in apart} == {t.cell for t in steps}
    assert split(list(reversed(steps)))[1] == apart


def run(*arguments: str) -> str:
    """`wisp`, whose last words are JSON."""
    result = CliRunner().invoke(cli.app, list(arguments))
    assert result.exit_code == 0, result.output
    return result.stdout


def test_an_emulated_a100_is_profiled_to_what_the_paper_s_line_does(tmp_path: Path) -> None:
    out = tmp_path / "new" / "cost.json"
    told = json.loads(
        run("profile", "--target", "a100-qwen3-32b@1.3", "--engine", "emulated", "--out", str(out), "--json")
    )
    profile = msgspec.json.decode(out.read_bytes(), type=CostProfile)
    assert told["fit"] == json.loads(out.read_text())["fit"]
    assert (profile.engine, profile.model) == ("emulated", "a100-qwen3-32b@1.3")
    assert 0.02 < profile.line.mape <= 0.049
    assert profile.line.r2 > 0.98
    assert profile.fit.mape < 0.6 * profile.line.mape  # the knee is worth it
    apart, timed = profile.steps["kept_apart"], len(profile.measured)
    assert apart / timed == pytest.approx(0.3, abs=0.01)
    assert 0.015 < profile.noise < 0.035  # its profile says 3 %
    assert timed == profile.steps["fitted"] + apart
    assert str(tmp_path) not in out.read_text()
    coefficients, model = read_cost(out)
    assert (coefficients, model) == (profile.coefficients, "a100-qwen3-32b@1.3")
    assert 35 < coefficients.step < 42  # 65.6 GB of weights at 1.7 TB/s


@pytest.mark.parametrize("name", [path.stem for path in sorted(HARDWARE.glob("*.toml"))])
def test_the_simulator_s_shortcut_is_what_a_profile_finds(name: str) -> None:
    told = json.loads(run("profile", "--target", name, "--engine", "emulated", "--quick", "--json"))
    found, known = msgspec.convert(told["fit"]["coefficients"], Coefficients), profiled(hardware(name))
    profile = hardware(name)
    size = EngineSize(profile.step_tokens, profile.slots, profile.kv_tokens, profile.slot_tokens)
    loads = [c.load for c in cells(size, quick=True)]
    assert median(abs(found.ms(load) / known.ms(load) - 1.0) for load in loads) < 0.05


def test_mistakes_are_named(tmp_path: Path) -> None:
    def refused(*arguments: str) -> str:
        result = CliRunner().invoke(cli.app, ["profile", *arguments])
        assert isinstance(result.exception, ConfigError), result.output
        return str(result.exception)

    assert "one of the two" in refused()
    assert "one of the two" in refused("--draft", "ngram", "--target", "tiny-target")
    assert "nothing to profile" in refused("--target", "null", "--engine", "null")
    assert "--threads 1" in refused("--target", "tiny-target", "--cpu-time", "--threads", "2")
    assert "unknown hardware profile" in refused("--target", "tiny", "--engine", "emulated")
    path = tmp_path / "cost.json"
    for text, said in {
        "": "no cost profile",
        "[]": "no cost profile",
        "{}": "look at 'step'",
        '{"step": 1, "token": 1, "speed": 3}': "look at 'speed'",
        '{"step": -1, "token": 1}': "must not be negative",
        '{"step": 1e300, "token": 1}': "nor above",
        '{"step": 0, "token": 0}': "a step must take time",
        '{"format": "wisp.cost.v9"}': "this release reads wisp.cost.v1",
        '{"format": "wisp.cost.v1"}': "no cost profile",
    }.items():
        path.write_text(text)
        with pytest.raises(ConfigError, match=said):
            read_cost(path)
    with pytest.raises(ConfigError, match="No such file"):
        read_cost(tmp_path / "nothing.json")
    path.write_bytes(msgspec.json.encode(TRUTH))
    assert read_cost(path) == (TRUTH, "")
