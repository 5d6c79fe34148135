"""The requests of a soak's sessions, and the comparison of answers with the target's own text."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import msgspec

from wisp.core.draft.signals import Signal
from wisp.core.protocol.edits import Edit
from wisp.core.protocol.sampling import Sampling
from wisp.engines.base import Proposal
from wisp.engines.emulated import fold
from wisp.engines.null import null_token

BEGINNINGS = tuple(f"Tenant {n}: answer in one line, please. " for n in range(8))  # prompts share KV
PROBE = 4  # tokens or characters by which the place of a text that went wrong is looked up
AGREE = 0.75  # of an emulated device's draft tokens


class Job(msgspec.Struct, frozen=True):
    """A request, and the answer that it must get. tokens: empty where only the text is known."""

    prompt: str
    seed: int
    max_tokens: int
    text: str
    tokens: tuple[int, ...] = ()
    temperature: float = 1.0


Jobs = Callable[[random.Random, int], Job]  # (chance, number of tokens) -> a job


def hashed(chance: random.Random, max_tokens: int) -> Job:
    """One for the emulated target: its tokens are bytes, and a hash of prompt, seed and position."""
    prompt = chance.choice(BEGINNINGS) + format(chance.getrandbits(64), "x")[: chance.randint(1, 16)]
    seed = chance.getrandbits(31)
    folded = fold(prompt.encode(), seed)
    tokens = tuple(null_token(folded, position) for position in range(max_tokens))
    return Job(prompt, seed, max_tokens, bytes(tokens).decode("utf-8", "replace"), tokens)


def flaw(said: Sequence[object], truth: Sequence[object], *, whole: bool) -> str:
    """ "", or what is wrong with an answer, or with its beginning: lost, doubled or wrong text."""
    pairs = zip(said, truth, strict=False)
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(said), len(truth)))
    if same == len(said):
        return "lost" if whole and same < len(truth) else ""
    rest = said[same : same + PROBE]
    for at in range(
        len(truth) - PROBE + 1 if len(rest) == PROBE else 0
    ):  # a shorter one says nothing of its place
        if truth[at : at + PROBE] == rest:
            return "doubled" if at < same else "lost"
    return "doubled" if same == len(truth) else "wrong"


class HashDraft:
    """DraftEngine of an emulated device: it knows the target's hash, and misses by chance."""

    name = "hash"

    def __init__(self, seed: int) -> None:
        self._chance = random.Random(seed)
        self._folded: dict[str, int] = {}

    def propose(
        self,
        session: str,
        context: Sequence[int],
        position: int,
        sampling: Sampling,
        edit: Edit | None = None,
    ) -> Proposal | None:
        """The target's token, or another one."""
        if session not in self._folded:
            self._folded[session] = fold(context[: len(context) - position], sampling.seed)
        token = null_token(self._folded[session], position)
        right = self._chance.random() < AGREE
        return Proposal(token if right else (token + 1) % 256, Signal(confidence=AGREE))

    def forget(self, session: str) -> None:
        self._folded.pop(session, None)

    def close(self) -> None:
        self._folded.clear()
