"""The predictor: will the target accept this draft token, given that it accepted those before it?

A small model (logistic regression or a multilayer perceptron, trained by `wisp train`) reads a few cheap
statistics of the draft distribution. On the device its output is recalibrated online, since acceptance shifts
with the domain, the temperature and the pair of models: p = sigmoid(a z + b), with a and b tracked by a
Gaussian approximation to the posterior of a logistic regression with forgetting.

A verdict teaches that every accepted token was a success, and the first rejected one a failure. A draft that was
accepted whole is censored: it says nothing of the token behind it, and adds successes only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from math import exp
from typing import Any

import numpy as np
import numpy.typing as npt

from wisp.core.draft.signals import Signal
from wisp.core.errors import ConfigError
from wisp.core.protocol.sampling import COLDEST

FEATURES = (
    "logit_confidence",
    "entropy",
    "margin",
    "log_spread",
    "log_lead",
    "log_depth",
    "recent",
    "sampled",
    "logit_confidence_sampled",
    "log_lead_sampled",
)
VERSION = 2


def features(signal: Signal, depth: int, recent: float, temperature: float) -> list[float]:
    """The model's inputs for a proposed token.

    depth: tokens drafted since the last committed one. recent: smoothed acceptance of late, 0 to 1. Confidence and
    lead mean different things with and without a temperature, so each of them is there twice.
    """
    confidence = min(max(signal.confidence, 1e-4), 1 - 1e-4)
    logit, lead = math.log(confidence / (1 - confidence)), math.log(max(signal.lead, 1e-3))
    sampled = 1.0 if temperature >= COLDEST else 0.0
    return [
        logit,
        signal.entropy,
        signal.margin,
        math.log(max(signal.spread, 1e-3)),
        lead,
        math.log1p(depth),
        recent,
        sampled,
        sampled * logit,
        sampled * lead,
    ]


class Predictor:
    """Fixed weights: standardise, then layers with tanh between them, then a logit."""

    def __init__(
        self,
        mean: npt.ArrayLike,
        scale: npt.ArrayLike,
        layers: Sequence[tuple[npt.ArrayLike, npt.ArrayLike]],
        about: dict[str, Any] | None = None,
    ) -> None:
        """`layers`: (weights of shape [in, out], biases of shape [out]); the last has one output."""
        self.mean = np.asarray(mean, np.float64)
        self.scale = np.asarray(scale, np.float64)
        self.layers = [(np.asarray(w, np.float64), np.asarray(b, np.float64)) for w, b in layers]
        self.about = about or {}

    def odds(self, signal: Signal, depth: int, recent: float, temperature: float) -> float:
        """Log odds that this proposal is accepted; the arguments are those of `features`."""
        return self.logit(features(signal, depth, recent, temperature))

    def logit(self, x: Sequence[float]) -> float:
        """The model's log odds of acceptance."""
        return float(self.logits(np.asarray(x, np.float64)[None, :])[0])

    def logits(self, x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Log odds of rows of features, shape [n, len(FEATURES)] -> [n]."""
        h = (x - self.mean) / self.scale
        for w, b in self.layers[:-1]:
            h = np.tanh(h @ w + b)
        w, b = self.layers[-1]
        out: npt.NDArray[np.float64] = (h @ w + b)[:, 0]
        return out

    def to_dict(self) -> dict[str, Any]:
        return {
            "version": VERSION,
            "features": list(FEATURES),
            "mean": self.mean.tolist(),
            "scale": self.scale.tolist(),
            "layers": [[w.tolist(), b.tolist()] for w, b in self.layers],
            "about": self.about,
        }

    @classmethod
    def from_dict(cls, data: Any) -> Predictor:
        """The inverse of `to_dict`. Raises ConfigError for another version or other features."""
        if (
            not isinstance(data, dict)
            or data.get("version") != VERSION
            or tuple(data.get("features", ())) != FEATURES
        ):
            raise ConfigError("this predictor was trained for another release; run `wisp train` again")
        try:
            return cls(data["mean"], data["scale"], [(w, b) for w, b in data["layers"]], data.get("about"))
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"the predictor file is damaged: {error!r}") from None


TRUST = 30.0  # observations that the trained model (a = 1, b = 0) is worth at the start
PAST = 0.995  # weight of the past after one more observation: half of it is gone after 138


class Calibration:
    """Online Platt scaling with forgetting: p = sigmoid(a z + b). One for a device, shared by its sessions."""

    __slots__ = ("_pa", "_paa", "_pab", "_pb", "_pbb", "a", "b")

    def __init__(self) -> None:
        self.a, self.b = 1.0, 0.0
        # Precision of (a, b): the prior, and what was observed.
        self._pa, self._pb = 0.5 * TRUST, 0.15 * TRUST
        self._paa, self._pab, self._pbb = self._pa, 0.0, self._pb

    def probability(self, z: float) -> float:
        """Calibrated probability for a logit of the model."""
        x = self.a * z + self.b
        return 1.0 / (1.0 + exp(-x)) if x > -700.0 else 0.0  # `sigmoid`, asked for with each token

    def learn(self, z: float, accepted: bool) -> None:
        """One observed outcome: a Newton step of the log posterior."""
        p = self.probability(z)
        a, b, f, pa, pb = self.a, self.b, PAST, self._pa, self._pb
        w = p * (1 - p)
        if w < 1e-3:
            w = 1e-3
        # Old observations fade, the prior does not: precision decays towards it.
        wz = w * z
        self._paa = paa = pa + f * (self._paa - pa) + wz * z
        self._pab = pab = f * self._pab + wz
        self._pbb = pbb = pb + f * (self._pbb - pb) + w
        error = (1.0 if accepted else 0.0) - p
        pull = 1 - f  # and the prior keeps pulling a little
        ga = error * z - pull * pa * (a - 1.0)
        gb = error - pull * pb * b
        det = paa * pbb - pab * pab
        a += (pbb * ga - pab * gb) / det
        self.b = b + (paa * gb - pab * ga) / det
        self.a = 0.2 if a < 0.2 else 3.0 if a > 3.0 else a


def sigmoid(x: float) -> float:
    """1 / (1 + e^-x), without overflow."""
    return 1.0 / (1.0 + math.exp(-x)) if x > -700.0 else 0.0
