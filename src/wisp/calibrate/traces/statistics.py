"""The recorded statistics of a draft distribution: those of `Signal`, and others that cost almost nothing.

Recording is slow and replaying is fast, so this is a superset of the statistics that policies use today.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from wisp.core.draft.signals import lead
from wisp.core.protocol.sampling import Sampling

COLUMNS = (
    "confidence",  # probability of the proposed token (at temperature 1, as all probabilities here)
    "entropy",  # of the whole distribution, nats
    "margin",  # probability of the likeliest id minus that of the second
    "spread",  # standard deviation of the logits
    "second",  # probability of the second likeliest id
    "third",  # probability of the third
    "collision",  # sum of squared probabilities
    "peak",  # largest logit minus the mean logit
    "lead",  # by how much the proposal beat the next best, logits; see `lead`
)

Row = npt.NDArray[np.float32]


def statistics(logits: Row, token: int, sampling: Sampling, position: int) -> Row:
    """Values of COLUMNS, for `token` proposed at generated `position` by these `logits` (shape [vocabulary])."""
    top = int(np.argmax(logits))
    peak = float(logits[top])
    shifted = logits - logits[top]
    weights = np.exp(shifted)
    z = float(weights.sum(dtype=np.float64))
    entropy = float(np.log(z) - np.dot(weights, shifted) / z)
    collision = float(np.dot(weights, weights)) / z**2
    confidence, best = float(weights[token]) / z, float(weights[top]) / z
    weights[top] = -1.0
    runner = int(np.argmax(weights))
    second, third = max(float(weights[runner]), 0.0) / z, 0.0
    if weights.size > 2:
        weights[runner] = -1.0
        third = float(weights.max()) / z
    gap = peak - float(logits.mean(dtype=np.float64))
    ahead = lead(logits, token, sampling, position, (top, runner))
    values = (confidence, entropy, best - second, float(logits.std()), second, third, collision, gap, ahead)
    return np.array(values, np.float32)
