"""Cheap statistics of a draft distribution: what an edge can know of how sure its drafter is."""

from __future__ import annotations

import msgspec
import numpy as np
import numpy.typing as npt


class Signal(msgspec.Struct, frozen=True, array_like=True):
    """Statistics of the draft distribution behind one proposed token, at temperature 1, natural log.

    confidence: probability of the proposed token
    entropy:    of the whole distribution, nats
    margin:     probability of the likeliest id minus that of the second
    spread:     standard deviation of the logits
    """

    confidence: float = 0.0
    entropy: float = 0.0
    margin: float = 0.0
    spread: float = 0.0


def signal(logits: npt.NDArray[np.float32], token: int) -> Signal:
    """The signal of `token` under `logits` (shape [vocabulary])."""
    top = int(np.argmax(logits))
    peak = logits[top]
    shifted = logits - peak
    weights = np.exp(shifted)
    z = float(weights.sum(dtype=np.float64))
    entropy = float(np.log(z) - np.dot(weights, shifted) / z)
    weights[top], best = -1.0, float(weights[top])
    second = max(float(weights.max()), 0.0)
    confidence = best / z if token == top else float(weights[token]) / z
    return Signal(confidence, entropy, (best - second) / z, float(logits.std()))
