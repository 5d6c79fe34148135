"""The benchmark of one client's log probabilities does what it says: lots in turn, and one session that has them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import logprobs
from benchmarks.logprobs import SESSIONS, VOCABULARY, House, run_bench_logprobs
from wisp.core.protocol.messages import Verdict
from wisp.engines.emulated import EmulatedTarget, hardware


def test_a_lot_takes_part_as_a_whole_and_one_session_of_the_second_has_log_probabilities() -> None:
    engine = EmulatedTarget("h200", hardware(logprobs.PROFILE), n_vocab=VOCABULARY)
    seen: list[Verdict] = []

    class Watched(House):
        def _note(self, verdict: Verdict) -> None:
            seen.append(verdict)
            super()._note(verdict)

    house = Watched(engine, engine.choose, VOCABULARY - 1)
    for lot in (0, 1, 1, 0):
        seen.clear()
        assert house.step(lot) > 0
        assert sorted(v.session for v in seen) == sorted(house.lots[lot])
        assert [v.session for v in seen if v.logprobs] == ["with-0"] * lot
    assert house.device_ms > 10


def test_without_vllm_the_emulated_engine_alone_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(logprobs, "STEPS", 3)
    run_bench_logprobs(tmp_path / "found.json", as_json=False)
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["sessions"], found["alternatives"]) == (SESSIONS, 20)
    [row] = found["rows"]
    assert row["engine"] == "emulated, h200-qwen3-8b"
    assert row["low"] <= row["rise"] <= row["high"]
