"""How far a session is: its prompt and the tokens that were committed, kept as one chain."""

from __future__ import annotations

from wisp.core.errors import ProtocolError
from wisp.core.history import Match
from wisp.core.protocol.messages import Open
from wisp.core.protocol.step import TokenLogprob
from wisp.core.verify.kv import Tokens, common_prefix, packed


class Progress:
    """Prompt and committed tokens. `entries` are the log probabilities of the last tokens, as far as asked for.

    at_hand:   tokens of the prompt whose KV was there when the session was opened
    reused:    tokens of the prompt whose KV was there when the session first got a slot; None before
    elsewhere: another verifier has committed some of the tokens
    known:     tokens of the chain that the history has (`own_drafts`); -1 before the first
    match:     what the history says of the tokens after these; None if it says nothing, or was not asked
    """

    __slots__ = (
        "at_hand", "chain", "elsewhere", "entries", "known", "logprobs", "match", "n_prompt", "reused",
    )  # fmt: skip

    def __init__(self, open_: Open) -> None:
        self.n_prompt = len(open_.prompt)
        self.chain = _chain(open_)  # prompt + committed
        self.logprobs = open_.logprobs  # None, or how many alternatives to report
        self.entries: list[TokenLogprob] = []
        self.at_hand = 0
        self.reused: int | None = None
        self.elsewhere = bool(open_.committed)
        self.known = -1
        self.match: Match | None = None

    @property
    def committed(self) -> int:
        return len(self.chain) - self.n_prompt

    def append(self, tokens: list[int], logprobs: list[TokenLogprob]) -> None:
        """Commit `tokens`, with their log probabilities if the step computed any."""
        self.chain.fromlist(tokens)
        if self.logprobs is None:
            return
        if len(logprobs) < len(tokens):
            self.entries = []  # entries must belong to the last tokens
        else:
            self.entries += logprobs[: len(tokens)]

    def tokens_from(self, base: int) -> list[int]:
        return self.chain[self.n_prompt + base :].tolist()

    def entries_from(self, base: int) -> list[TokenLogprob]:
        """The log probabilities of `tokens_from(base)`: one each, or none if some are unknown."""
        n = self.committed - base
        return self.entries[-n:] if 0 < n <= len(self.entries) else []

    def adopt(self, open_: Open) -> bool:
        """Take over the edge's tokens if it has more of them. Returns whether the chain changed.

        Raises ProtocolError("conflict") if neither of the two histories is a prefix of the other, or the prompts
        differ.
        """
        if self.n_prompt != len(open_.prompt) or self.chain[: self.n_prompt] != packed(open_.prompt):
            raise conflict()
        mine = self.tokens_from(0)
        shared = common_prefix(mine, open_.committed)
        if shared < min(len(mine), len(open_.committed)):
            raise ProtocolError("conflict", f"two histories of this session differ at token {shared}")
        longer = len(open_.committed) > len(mine)
        if longer:
            self.chain = _chain(open_)
            self.entries, self.match = [], None
            self.elsewhere = True
        if open_.logprobs != self.logprobs:
            self.logprobs, self.entries = open_.logprobs, []
        return longer


def conflict() -> ProtocolError:
    """The error for an Open that does not fit the session that it names."""
    return ProtocolError("conflict", "a session is resumed with the prompt and parameters it was opened with")


def _chain(open_: Open) -> Tokens[int]:
    chain = packed(open_.prompt)
    chain.fromlist(open_.committed)
    return chain
