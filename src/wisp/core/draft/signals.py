"""Cheap statistics of a draft distribution, which tell how sure the drafter is."""

from __future__ import annotations

import msgspec
import numpy as np
import numpy.typing as npt

from wisp.core.protocol.sampling import Sampling, gumbels

STATISTICS = ("confidence", "entropy", "margin", "spread", "lead")  # fields of Signal that are numbers
_NEAR = 10.0  # in units of the temperature
_GREEDY = Sampling()


class Signal(msgspec.Struct, frozen=True, array_like=True):
    """Statistics of the draft distribution behind one proposed token, at temperature 1, natural log.

    confidence: probability of the proposed token
    entropy:    of the whole distribution, nats
    margin:     probability of the likeliest id minus that of the second
    spread:     standard deviation of the logits
    lead:       by how much the proposal beat the next best, logits; see `lead`
    counted:    an n-gram's: only `confidence` means anything, and it comes from counts
    certain:    nothing else is allowed here; no model was asked
    """

    confidence: float = 0.0
    entropy: float = 0.0
    margin: float = 0.0
    spread: float = 0.0
    lead: float = 0.0
    counted: bool = False
    certain: bool = False


def signal(
    logits: npt.NDArray[np.float32], token: int, sampling: Sampling = _GREEDY, position: int = 0
) -> Signal:
    """The signal of `token`, proposed at generated `position` by `logits` (shape [vocabulary])."""
    top = int(np.argmax(logits))
    peak = logits[top]
    shifted = logits - peak
    weights = np.exp(shifted)
    z = float(weights.sum(dtype=np.float64))
    entropy = float(np.log(z) - np.dot(weights, shifted) / z)
    best, chosen = float(weights[top]), float(weights[token])
    weights[top] = -1.0
    runner = int(np.argmax(weights))
    second = max(float(weights[runner]), 0.0)
    clear = lead(logits, token, sampling, position, (top, runner))
    return Signal(chosen / z, entropy, (best - second) / z, float(logits.std()), clear)


def lead(
    logits: npt.NDArray[np.float32],
    token: int,
    sampling: Sampling,
    position: int,
    best_two: tuple[int, int],
) -> float:
    """How clearly `token` was chosen, in logits: its score minus the next best, T times the noise included.

    The noise is shared with the target, so this says more than the distribution alone. Greedy: the gap between
    the best two logits. Of others, only ids within 10 T of the maximum (and the best two) are looked at.
    Truncation by top-k, top-p and min-p is not considered.
    """
    if sampling.greedy:
        first, second = best_two
        return float(logits[token]) - float(logits[second if token == first else first])
    temperature = sampling.temperature
    floor = min(float(logits[best_two[0]]) - _NEAR * temperature, float(logits[best_two[1]]))
    near = np.flatnonzero(logits >= floor)
    others = near[near != token]
    ids = np.append(others, token)
    scores = logits[ids].astype(np.float64) + temperature * gumbels(sampling.seed, position, ids)
    return float(scores[-1] - scores[:-1].max())
