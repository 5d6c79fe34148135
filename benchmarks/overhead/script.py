"""What a session says, and what it must hear: encoded beforehand, so that the client costs little."""

from __future__ import annotations

import msgspec

from wisp.core.protocol.messages import Cancel, Draft, Open, encode
from wisp.core.protocol.sampling import Sampling
from wisp.engines.null import DIGEST, null_token

DRAFT = 4  # tokens per draft
RIGHT = (4, 4, 2, 4, 0)  # how many of them agree, in turn: 70 %
MAX_TOKENS = 128  # per session; then it is opened again
PROMPT = 64  # tokens, of which half are the same for all sessions
SEEDS = 8  # different outputs


class Round(msgspec.Struct, frozen=True):
    """A frame to send and the answer that is due: (round, base, accepted, tokens, finish), None for any."""

    frame: bytes
    answer: tuple[int, int, int, list[int], str] | None = None


class Script(msgspec.Struct, frozen=True):
    """One session from start to end, encoded beforehand, and the frame that ends it in between."""

    rounds: list[Round]
    cancel: bytes = b""


def script(index: int, truth: list[int], seed: int, committed: int = 0) -> Script:
    """Session `index`, whose output is `truth`, of which `committed` tokens are there at the start."""
    name = f"overhead-{index}"
    rounds: list[Round] = []
    base = committed
    while base < len(truth):
        number, room = len(rounds), len(truth) - base
        right = RIGHT[number % len(RIGHT)]
        draft = [t if i < right else (t + 1) % 256 for i, t in enumerate(truth[base : base + DRAFT])]
        n = min(right + 1, room)  # tokens of the verdict
        answer = (number, base, n - 1, truth[base : base + n], "length" if n == room else "")
        frame = encode(Draft(name, number, base, draft))
        if number == 0:
            sampling = Sampling(seed=seed)
            opening = Open(
                name,
                0,
                _prompt(index),
                sampling,
                len(truth),
                committed=truth[:base],
                draft=draft,
                digest=DIGEST,
            )
            frame = encode(opening)
        rounds.append(Round(frame, answer))
        base += n
    return Script(rounds, encode(Cancel(name)))


def _prompt(index: int) -> list[int]:
    """Half the same for all, half this session's own."""
    half = range(PROMPT // 2)
    return [*half, *((index * 7 + i * i) % 256 for i in half)]


def scripts(sessions: int, committed: int = 0) -> list[Script]:
    """One for each session; they share `SEEDS` outputs."""
    truths = [
        [null_token(seed, position) for position in range(committed + MAX_TOKENS)] for seed in range(SEEDS)
    ]
    return [script(i, truths[i % SEEDS], i % SEEDS, committed) for i in range(sessions)]
