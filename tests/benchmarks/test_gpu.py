"""What is measured on a GPU, on a CPU: small shapes, and figures that are known beforehand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

pytest.importorskip("torch")

from benchmarks.gpu import bits, choice, steps
from benchmarks.gpu.transformer import SHAPES
from wisp.engines.emulated import hardware

pytestmark = pytest.mark.filterwarnings("default")  # PyTorch's own


@pytest.mark.parametrize("overlap", [1.3, 2.0])
def test_the_roofline_finds_the_overlap_that_made_the_times(overlap: float) -> None:
    shape = SHAPES["qwen3-8b"]
    truth = msgspec.structs.replace(
        steps._hardware(shape, (4800.0, 989.0), overlap),
        bandwidth_share=0.8,
        tflops_share=0.6,
        launch_ms=0.3,
        sequence_ms=0.002,
    )
    cells = []
    for n in (1, 8, 64, 256, 512):
        for rows in (1, 5):
            for cached in (0, 512, 4096):
                cell = steps.Cell(n, rows, cached, 0.0)
                cells.append(msgspec.structs.replace(cell, ms=truth.step_ms(cell.load)))
    found, rms = steps.roofline(shape, cells)
    assert rms < 0.01
    assert found.overlap == overlap
    assert found.bandwidth * found.bandwidth_share == pytest.approx(0.8 * 4800, rel=0.01)


def test_steps_are_measured_and_their_profile_can_be_emulated(tmp_path: Path) -> None:
    steps.run(["qwen3-8b"], tmp_path, tiny=True, limit_s=60.0)
    found = json.loads((tmp_path / "steps-qwen3-8b.json").read_text())
    assert len(found["figures"]["cells"]) == 24
    assert all(cell["ms"] > 0 for cell in found["figures"]["cells"])
    assert found["versions"]["torch"]
    assert hardware(str(tmp_path / "qwen3-8b.toml")).layers == SHAPES["tiny"].layers


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Of PyTorch: several split the sums of a few rows, and of many rows not."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_with_fixed_shapes_every_bit_is_kept(tmp_path: Path) -> None:
    bits.run("qwen3-8b", tmp_path, tiny=True)
    found = json.loads((tmp_path / "bits.json").read_text())["figures"]
    assert len(found) == 36
    assert all(f["equal"] and f["gap"] == 0 for f in found if f["kernels"] == "fixed")


def test_choices_are_the_rules_or_the_part_is_skipped_by_name(tmp_path: Path) -> None:
    choice.run(tmp_path, tiny=True)
    found = json.loads((tmp_path / "choice.json").read_text())["figures"]
    assert "skipped" in found or (found["rows_checked"] > 0 and found["parts_wrong"] == 0)
