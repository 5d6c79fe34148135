"""Per-request statistics of speculation, in the shape that vLLM reports them."""

from __future__ import annotations

import msgspec


class SpecStats(msgspec.Struct):
    """Counts over the rounds of one session that had a draft.

    A round with d draft tokens of which a were accepted commits a + 1 tokens; its acceptance length is a + 1.
    """

    num_spec_steps: int = 0
    num_draft_tokens: int = 0
    num_accepted_draft_tokens: int = 0
    acceptance_histogram: list[int] = []  # entry i: rounds in which i draft tokens were accepted

    def round(self, drafted: int, accepted: int) -> None:
        """Count one verdict. Rounds without a draft are not speculation and do not count."""
        if drafted <= 0:
            return
        self.num_spec_steps += 1
        self.num_draft_tokens += drafted
        self.num_accepted_draft_tokens += accepted
        short = accepted + 1 - len(self.acceptance_histogram)
        self.acceptance_histogram.extend([0] * short)
        self.acceptance_histogram[accepted] += 1

    def add(self, other: SpecStats) -> None:
        """Count another session's rounds, too."""
        self.num_spec_steps += other.num_spec_steps
        self.num_draft_tokens += other.num_draft_tokens
        self.num_accepted_draft_tokens += other.num_accepted_draft_tokens
        ours, theirs = self.acceptance_histogram, other.acceptance_histogram
        ours.extend([0] * (len(theirs) - len(ours)))
        for i, rounds in enumerate(theirs):
            ours[i] += rounds

    @property
    def mean_acceptance_length(self) -> float:
        """Committed tokens per round with a draft; 0.0 before the first."""
        steps = self.num_spec_steps
        return 1.0 + self.num_accepted_draft_tokens / steps if steps else 0.0

    @property
    def draft_acceptance_rate(self) -> float:
        """Accepted draft tokens over draft tokens; 0.0 before the first."""
        return self.num_accepted_draft_tokens / self.num_draft_tokens if self.num_draft_tokens else 0.0

    def report(self) -> dict[str, object]:
        """The JSON object `metrics.speculative_decoding`."""
        return {
            "mean_acceptance_length": round(self.mean_acceptance_length, 4),
            "draft_acceptance_rate": round(self.draft_acceptance_rate, 4),
            "acceptance_histogram": list(self.acceptance_histogram),
            "num_spec_steps": self.num_spec_steps,
            "num_accepted_draft_tokens": self.num_accepted_draft_tokens,
            "num_draft_tokens": self.num_draft_tokens,
        }
