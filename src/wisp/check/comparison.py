"""The same request answered twice, with drafts and by the target alone: the difference, and the cost."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

_TRIFLING_MS = 10.0  # a step of a model that is of any use takes longer on a CPU
_GAIN = 1.5  # times as fast: too much to explain away


@dataclass(frozen=True)
class Token:
    """A token as the API shows it. `data` are its bytes; `logprob` is the target's own."""

    text: str
    data: tuple[int, ...]
    logprob: float


@dataclass
class Answer:
    """A streamed answer. Times are seconds since the request was sent, seen by the client.

    from_draft: for each token, whether it is an accepted draft token
    spec:       `metrics.speculative_decoding`
    """

    tokens: list[Token] = field(default_factory=list)
    from_draft: list[bool] = field(default_factory=list)
    finish: str = ""
    first: float = 0.0
    last: float = 0.0
    spec: dict[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        return bytes(b for token in self.tokens for b in token.data).decode("utf-8", "replace")

    @property
    def tokens_per_second(self) -> float:
        """Tokens after the first, over the time from the first to the last."""
        return (len(self.tokens) - 1) / (self.last - self.first) if self.last > self.first else 0.0

    def report(self) -> dict[str, object]:
        return {
            "text": self.text,
            "tokens": len(self.tokens),
            "finish_reason": self.finish,
            "ttft_ms": round(self.first * 1e3, 1),
            "tokens_per_second": round(self.tokens_per_second, 2),
        }


@dataclass
class Comparison:
    """One request, answered both ways."""

    prompt: str
    sampling: str
    edge: Answer
    alone: Answer

    @property
    def differs_at(self) -> int | None:
        """Index of the first token that is not the same (0-based); None where the answers are identical."""
        ours, theirs = ([(t.text, t.data) for t in a.tokens] for a in (self.edge, self.alone))
        for index, (one, other) in enumerate(zip(ours, theirs, strict=False)):
            if one != other:
                return index
        same = len(ours) == len(theirs) and self.edge.finish == self.alone.finish
        return None if same else min(len(ours), len(theirs))

    @property
    def same_logprobs(self) -> bool:
        """Whether the target's log probabilities agree, too, in every bit."""
        return [t.logprob for t in self.edge.tokens] == [t.logprob for t in self.alone.tokens]

    @property
    def verdict(self) -> str:
        return "identical" if self.differs_at is None else f"DIFFERENT at token {self.differs_at}"

    def report(self) -> dict[str, object]:
        return {
            "prompt": self.prompt,
            "sampling": self.sampling,
            "identical": self.differs_at is None,
            "differs_at": self.differs_at,
            "identical_logprobs": self.same_logprobs,
            "edge": {
                **self.edge.report(),
                "tokens_from_drafts": sum(self.edge.from_draft),
                "speculative_decoding": self.edge.spec,
            },
            "alone": self.alone.report(),
        }


@dataclass(frozen=True)
class Cost:
    """Means over all answers, in milliseconds. A round is: draft, send, verify.

    committed, drafted: tokens of a round; accepted: share of drafted tokens
    """

    round_ms: float
    step_ms: float
    committed: float
    drafted: float
    accepted: float

    @property
    def speedup(self) -> float:
        """Token speed through the edge, over that of the target alone."""
        return self.step_ms * self.committed / self.round_ms if self.round_ms else 0.0


def measure(compared: list[Comparison]) -> Cost:
    """Costs over all answers. The first token of an answer comes before its first round."""
    rounds = sum(c.edge.spec.get("num_spec_steps", 0) for c in compared)
    drafted = sum(c.edge.spec.get("num_draft_tokens", 0) for c in compared)
    agreed = sum(c.edge.spec.get("num_accepted_draft_tokens", 0) for c in compared)
    edge_ms = 1e3 * sum(c.edge.last - c.edge.first for c in compared)
    alone_ms = 1e3 * sum(c.alone.last - c.alone.first for c in compared)
    edge_tokens = sum(len(c.edge.tokens) - 1 for c in compared)
    alone_tokens = sum(len(c.alone.tokens) - 1 for c in compared)
    return Cost(
        round_ms=edge_ms / max(1, rounds),
        step_ms=alone_ms / max(1, alone_tokens),
        committed=edge_tokens / max(1, rounds),
        drafted=drafted / max(1, rounds),
        accepted=agreed / max(1, drafted),
    )


def remark(cost: Cost) -> str:
    """The meaning of the measured costs for speed, here and elsewhere."""
    measured = (
        f"About speed: drafting and verifying {cost.drafted:.1f} tokens took {short(cost.round_ms)} ms a round and "
        f"gave {cost.committed:.2f} tokens; the target alone took {short(cost.step_ms)} ms a token. Speculation was "
        f"{cost.speedup:.2f} times as fast as the target alone."
    )
    if cost.step_ms < _TRIFLING_MS:
        why = "These models are so small that a round costs the way there and back, which says nothing about others."
    elif cost.speedup > _GAIN:
        why = (
            "Here a step costs hardly more with more tokens, as where reading the weights is what takes time."
        )
    else:
        why = (
            "On a CPU the cost of a step grows with its tokens: verifying k of them costs about k decode steps, so "
            "there is little or nothing to win (and exact mode is generous: it pads a lone decode step to two rows); "
            "besides, both processes share this machine."
        )
    elsewhere = (
        "Speculation pays where a step has a large fixed cost, however few tokens it carries, as on an accelerator "
        "that reads all weights for each; and where the device that drafts would otherwise be idle."
    )
    return f"{measured} {why} {elsewhere}"


def short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"
