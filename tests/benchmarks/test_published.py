"""What is made of other people's measurements: made-up times give back the overlap that made them."""

from __future__ import annotations

import pytest

from benchmarks import published
from benchmarks.published import PUBLISHED, Run, balanced, found, solved


@pytest.mark.parametrize("p", [1.2, 2.0, 3.5])
def test_an_overlap_is_found_from_one_step_whose_parts_are_known(p: float) -> None:
    both = (30.0**p + 20.0**p) ** (1 / p)
    assert solved(30.0, 20.0, both) == pytest.approx(p, abs=1e-6)
    assert solved(20.0, 30.0, both) == pytest.approx(p, abs=1e-6)


def test_a_step_no_longer_than_its_longer_part_has_no_overlap_to_find() -> None:
    assert solved(30.0, 20.0, 29.9) is None


@pytest.mark.parametrize("p", [1.3, 2.2])
def test_an_overlap_is_found_from_a_table_of_step_times(p: float) -> None:
    of = PUBLISHED[0]
    runs = tuple(
        Run(r.batch, r.prompt, r.output, published._roofline_ms(of, r, p, 0.5, 0.85) + 2.0) for r in of.runs
    )
    fit = found(of._replace(runs=runs), 0.5)
    assert fit.p == pytest.approx(p, abs=0.051)
    assert fit.error < 0.002
    assert fit.bandwidth == pytest.approx(0.85, abs=0.02)
    assert fit.launch_ms == pytest.approx(2.0, abs=0.3)


def test_only_batches_with_which_the_overlap_shows_count() -> None:
    assert [(b.device, b.batch) for b in balanced()][::2] == [
        ("A100, fp16", 512), ("A100, fp16", 384), ("H100, fp8", 1024), ("H100, fp8", 768),
    ]  # fmt: skip
