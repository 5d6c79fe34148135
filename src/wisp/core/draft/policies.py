"""Drafting policies: after each drafted token, draft another or send; and how many tokens to send.

A policy is a small class with a name in `POLICIES`. It judges each proposed token (a probability of acceptance), and
decides on a `View` of the round: plain data and the session's `RoundTimes`. It never sees a model, a socket or a
clock. `Ahead` decides whether to draft ahead, while a draft is in flight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from math import prod
from typing import Protocol

import msgspec

from wisp.core.draft.predictor import Calibration, Predictor, sigmoid
from wisp.core.draft.round_times import Mean, RoundTimes
from wisp.core.draft.signals import Signal
from wisp.core.errors import ConfigError
from wisp.core.protocol.messages import MAX_DRAFT

STOPPING_IN_TIME = 1.1  # speed of `gain` over that of the best fixed length: 1.2 on average in replays
# Times as fast as drafting: the verifier's own decoding, for a session to begin with it. A change costs a round trip.
SWITCHING = 1.1
UNSURE = 0.25  # mean deviations of the wait that a verdict may be late and a step ahead still costs nothing
LONGEST = 16  # tokens in one draft, unless told otherwise


class Odds(msgspec.Struct, frozen=True, gc=False):
    """A policy's judgement of one token: probability of acceptance, and the log odds it was made from.

    counted, certain: of the token's `Signal`.
    """

    p: float
    z: float
    counted: bool = False
    certain: bool = False


CERTAIN = Odds(1.0, 0.0, certain=True)  # nothing else is allowed


class View(msgspec.Struct, frozen=True, gc=False):
    """A policy's view of the round when it decides.

    p:       acceptance probabilities of the tokens guessed beyond the committed ones, in order
    sent:    how many of them are in flight
    first:   index of the first that could be sent now (behind a draft in flight, the one before it guesses the
             verdict's own token)
    due_ms:  when the verdict on the draft in flight is expected
    opening: the target is reading the prompt
    """

    now_ms: float
    p: Sequence[float]
    sent: int
    first: int
    due_ms: float
    times: RoundTimes
    opening: bool = False

    @property
    def unsent(self) -> Sequence[float]:
        """Probabilities of the tokens that could be sent now."""
        return self.p[self.first :] if self.first else self.p


class DraftingPolicy(Protocol):
    """Decides where a draft ends. One instance per session. `priced`: the verifier's congestion price counts."""

    priced: bool

    def judge(self, signal: Signal, p: Sequence[float]) -> Odds:
        """The odds that the token just proposed is accepted, given that those before it (with `p`) are."""

    def more(self, view: View) -> bool:
        """Draft another token before sending?"""

    def take(self, view: View) -> int:
        """How many of the unsent tokens to send, at most."""

    def serve(self, view: View) -> bool:
        """Is it better to let the verifier decode by itself?"""

    def observe(self, odds: Sequence[Odds], accepted: int) -> None:
        """Of the tokens with these odds the first `accepted` agreed; the next, if any, did not."""


class Plain:
    """Base of the simple policies: confidence for odds, no price, no learning, no server mode."""

    priced = False

    def judge(self, signal: Signal, p: Sequence[float]) -> Odds:
        return CERTAIN if signal.certain else Odds(signal.confidence, 0.0)

    def serve(self, view: View) -> bool:
        return False

    def observe(self, odds: Sequence[Odds], accepted: int) -> None:
        return None


class Fixed(Plain):
    """SLED's policy: always k tokens."""

    def __init__(self, k: int) -> None:
        self.k = k

    def more(self, view: View) -> bool:
        return len(view.unsent) < self.k

    def take(self, view: View) -> int:
        return self.k


class Confidence(Plain):
    """SLED's other reading: stop before the first token with a confidence below `least`."""

    def __init__(self, least: float, longest: int = LONGEST) -> None:
        self.least = least
        self.longest = longest

    def more(self, view: View) -> bool:
        unsent = view.unsent
        return len(unsent) < self.longest and (not unsent or unsent[-1] >= self.least)

    def take(self, view: View) -> int:
        return next((i for i, p in enumerate(view.unsent) if p < self.least), len(view.unsent))


class Predicted(Confidence):
    """The paper's policy: stop at the first token that a trained predictor expects to be rejected, and send.

    That token is sent, too: it is drafted already, and the predictor is often wrong about it.
    """

    def __init__(self, judgement: Judgement, least: float | None = None, longest: int = LONGEST) -> None:
        """`least`: accept at this probability (default: where the predictor keeps 80 % of accepted tokens)."""
        super().__init__(least if least is not None else judgement.threshold, longest)
        self.judgement = judgement

    def take(self, view: View) -> int:
        return min(super().take(view) + 1, len(view.unsent))

    def judge(self, signal: Signal, p: Sequence[float]) -> Odds:
        return self.judgement.judge(signal, p)

    def observe(self, odds: Sequence[Odds], accepted: int) -> None:
        self.judgement.observe(odds, accepted)


class Judgement:
    """A predictor with the history it reads and, if there is one, a calibration that learns."""

    __slots__ = ("calibration", "counts", "predictor", "recent", "temperature")

    def __init__(
        self,
        predictor: Predictor,
        calibration: Calibration | None,
        counts: Calibration | None,
        temperature: float,
    ) -> None:
        """`counts` calibrates n-grams, which the predictor was not trained on."""
        self.predictor = predictor
        self.calibration = calibration
        self.counts = counts
        self.temperature = temperature
        self.recent = Mean(0.8, 0.1)

    @property
    def threshold(self) -> float:
        """The probability at which the trainer kept 80 % of the accepted tokens."""
        return float(self.predictor.about.get("threshold", 0.5))

    def judge(self, signal: Signal, p: Sequence[float]) -> Odds:
        """The predictor's odds, recalibrated. An n-gram's are its own."""
        if signal.certain:
            return CERTAIN
        if signal.counted:
            confidence = min(max(signal.confidence, 0.01), 0.99)
            z = math.log(confidence / (1.0 - confidence))
            return Odds(self.counts.probability(z) if self.counts else confidence, z, True)
        z = self.predictor.odds(signal, len(p), self.recent.value, self.temperature)
        calibration = self.calibration
        return Odds(calibration.probability(z) if calibration else sigmoid(z), z)

    def observe(self, odds: Sequence[Odds], accepted: int) -> None:
        """Learn from a verdict: successes, and the first failure if there was one."""
        counts, calibration, n = self.counts, self.calibration, min(len(odds), accepted + 1)
        self.recent.add_each(accepted, n)
        for i in range(n):
            each = odds[i]
            if each.certain:  # nothing to be learnt from it
                continue
            concerned = counts if each.counted else calibration
            if concerned is not None:
                concerned.learn(each.z, i < accepted)


class Gain:
    """The default: optimal stopping. A round is a renewal: it earns the tokens that it commits and costs its time.

    R is the session's speed, S the chance that all of the draft so far is accepted. One more token is worth drafting
    while its expected gain, S times its chance, exceeds (its draft time + its share of the verify time) x R, plus the
    verifier's price. A drafted token is worth sending while S exceeds the cost of verifying it. That is the
    renewal-reward optimum (Dinkelbach 1967), with every quantity measured. There is nothing to tune; `longest` bounds
    a draft.
    """

    __slots__ = ("_serving", "judge", "longest", "observe", "server_mode")
    priced = True

    def __init__(self, judgement: Judgement, longest: int = LONGEST, *, server_mode: bool = True) -> None:
        self.longest = longest
        self.server_mode = server_mode
        self.judge, self.observe = judgement.judge, judgement.observe
        self._serving = False

    def more(self, view: View) -> bool:
        p, first, times, longest = view.p, view.first, view.times, self.longest
        if len(p) - first >= longest:
            return False
        chance = prod(p[first:] if first else p) * times.acceptance.value
        return chance > (times.draft.value + times.verify.slope) * times.speed(longest) + times.price

    def take(self, view: View) -> int:
        times, first, longest = view.times, view.first, self.longest
        # The cost of verifying one more token, in committed tokens: this session's time, and the price for others.
        cost = times.verify.slope * times.speed(longest) + times.price
        survival, n = 1.0, 0
        for p in view.p[first : first + longest]:
            survival *= p
            if survival <= cost:
                break
            n += 1
        return n

    def serve(self, view: View) -> bool:
        times = view.times
        if not self.server_mode or times.wait.n < 2 or times.draft.n < 1:
            return self._serving
        serve_ms = times.serve_ms
        if serve_ms <= 0:
            return self._serving
        promised = STOPPING_IN_TIME * times.best_speed(self.longest)
        served, drafted = 1.0 / serve_ms, max(times.measured, promised)
        self._serving = served > drafted * (1.0 if self._serving else SWITCHING)
        return self._serving


class Ahead(msgspec.Struct, frozen=True):
    """Whether to draft on while a draft is in flight, on the guess that it is accepted.

    Time spent waiting is free. But a draft step that is running when the verdict comes delays a fresh start.

    energy:  least chance of being used for a token to be drafted ahead; it stands for the worth of the device's energy
    longest: most tokens drafted ahead
    send:    send them before the verdict is here, betting that it agrees
    """

    energy: float = 0.1
    longest: int = LONGEST
    send: bool = True

    def worth(self, view: View, price: float = 0.0) -> bool:
        """Is it worth drafting another token ahead, now? `price`: of a draft token; a dear one would not be sent."""
        times, p, sent = view.times, view.p, view.sent
        a = times.acceptance.value
        right = prod(p)
        steps, beyond = 1, len(p) - sent
        if not beyond:  # the next guess is of the verdict's own token: only one beyond it is of use
            right, steps = right * a, 2
        if beyond >= self.longest:
            return False
        if price and beyond > 1 and prod(p[sent + 1 :]) * a <= price:
            return False  # it would not be sent
        return self.pays(right, steps, view, view.due_ms)

    def pays(self, right: float, steps: int, view: View, due_ms: float) -> bool:
        """Is another draft token worth its time, if it takes `steps` draft steps, those before it are right with the
        chance `right`, and a verdict is expected at `due_ms`?"""
        times, wait = view.times, view.times.wait
        a = times.acceptance.value
        if right * a < self.energy:
            return False
        if view.opening or wait.n == 0:
            return True  # reading the prompt takes the target longer than a draft step
        d, left, unsure = times.draft.value, due_ms - view.now_ms, UNSURE * wait.deviation
        left = left + unsure if left > 0.0 else unsure
        late = steps * d - left
        if late <= 0.0:
            return True
        wrong_late = max(0.0, d - left)
        # If the guess is right, a token costs `late` instead of a whole draft step, if it is drafted at all then;
        # if it is wrong, a fresh start has to wait for the step that is running.
        speed = times.speed(self.longest)
        otherwise = max(0.0, a - d * speed)
        return right * (a - late * speed - otherwise) > (1.0 - right) * wrong_late * speed


POLICIES = ("fixed", "confidence", "predictor", "gain")


class Policies:
    """Makes policies from a command-line form, e.g. "fixed:4". One for a device: its sessions share the calibration."""

    def __init__(self, spec: str, predictor: Predictor | None = None, *, server_mode: bool = True) -> None:
        """`server_mode`: may a policy let the verifier decode by itself?

        Raises ConfigError for an unknown policy, a bad argument, or a missing predictor.
        """
        self.spec = spec
        self.predictor = predictor
        self.server_mode = server_mode
        self.calibration = Calibration()
        self.counts = Calibration()
        self.make()

    def make(self, temperature: float = 0.0) -> DraftingPolicy:
        """A policy for one session, whose tokens are sampled at this temperature."""
        name, _, argument = self.spec.partition(":")
        if name not in POLICIES:
            raise ConfigError(f"unknown drafting policy {self.spec!r}; choose one of: {', '.join(POLICIES)}")
        if name == "fixed":
            return Fixed(self._tokens(argument, 4))
        if name == "confidence":
            return Confidence(self._probability(argument) or 0.4)
        if self.predictor is None:
            raise ConfigError(f"drafting policy {name} needs a predictor; train one with `wisp train`")
        if name == "predictor":
            judgement = Judgement(self.predictor, None, None, temperature)
            return Predicted(judgement, self._probability(argument))
        judgement = Judgement(self.predictor, self.calibration, self.counts, temperature)
        return Gain(judgement, self._tokens(argument, LONGEST), server_mode=self.server_mode)

    def _tokens(self, argument: str, default: int) -> int:
        if not argument:
            return default
        if not argument.isdecimal() or not 1 <= int(argument) <= MAX_DRAFT:
            raise ConfigError(
                f"drafting policy {self.spec!r}: a draft has 1 to {MAX_DRAFT} tokens, e.g. fixed:4"
            )
        return int(argument)

    def _probability(self, argument: str) -> float | None:
        if not argument:
            return None
        try:
            value = float(argument)
        except ValueError:
            value = math.nan
        if not 0.0 < value < 1.0:
            raise ConfigError(f"drafting policy {self.spec!r}: give a probability, e.g. confidence:0.4")
        return value
