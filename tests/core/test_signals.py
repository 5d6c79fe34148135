"""Statistics of a draft distribution, by hand and against the rule of sampling."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wisp.core.draft.signals import lead, signal
from wisp.core.protocol.sampling import Sampling, target_token

# Probabilities 1/2, 1/4, 1/8, 1/8
LOGITS = np.log(np.array([4.0, 8.0, 2.0, 2.0], np.float32))


def test_statistics_by_hand() -> None:
    found = signal(LOGITS, 1)
    assert found.confidence == pytest.approx(0.5)
    assert found.margin == pytest.approx(0.25)
    assert found.entropy == pytest.approx(1.75 * math.log(2))
    assert found.spread == pytest.approx(float(LOGITS.std()))
    assert found.lead == pytest.approx(math.log(2))
    assert not found.counted


def test_a_proposal_that_is_not_the_likeliest_is_behind() -> None:
    found = signal(LOGITS, 2)
    assert found.confidence == pytest.approx(0.125)
    assert found.margin == pytest.approx(0.25)  # of the distribution, whatever is proposed
    assert found.lead == pytest.approx(-math.log(4))


def test_a_certain_token_has_no_entropy_and_a_tie_no_margin() -> None:
    certain = signal(np.array([0.0, 200.0, 0.0], np.float32), 1)
    assert (certain.confidence, certain.margin) == (1.0, 1.0)
    assert certain.entropy == pytest.approx(0.0, abs=1e-6)
    tie = signal(np.array([3.0, 3.0], np.float32), 0)
    assert (tie.margin, tie.lead) == (0.0, 0.0)


@given(st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=20), st.integers(0, 50), st.integers(0, 50))
def test_only_the_token_that_would_be_sampled_leads(values: list[float], seed: int, position: int) -> None:
    logits = np.array(values, np.float32)
    sampling = Sampling(temperature=0.9, seed=seed)
    chosen = target_token(logits, sampling, position)
    first, second = np.argsort(-logits, kind="stable")[:2].tolist()
    leads = [lead(logits, token, sampling, position, (first, second)) for token in range(len(values))]
    assert leads[chosen] == max(leads) >= 0.0
    assert sum(x > 0.0 for x in leads) <= 1
