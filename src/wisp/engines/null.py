"""An engine without a model: the target's token is a hash of (seed, position), and a step takes no time.

It measures the control plane: what a verification costs when the engine costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from wisp.core.protocol.messages import vocabulary_fingerprint
from wisp.core.protocol.sampling import hash32
from wisp.core.protocol.step import Copy, Slice, SliceResult
from wisp.engines.base import Check, EngineInfo, StepQueue, unasked
from wisp.engines.constraining import SlotTrackers, agreeing
from wisp.engines.identity import engine_digest
from wisp.engines.in_order import OneAtATime
from wisp.engines.special import NO_STAND_INS, StandIns

N_VOCAB = 257  # bytes and an end of sequence that never comes
EOS = 256
DIGEST = engine_digest("null")


def null_token(seed: int, position: int) -> int:
    """The target's token at generated `position`: a device that knows the seed can draft as well as it likes."""
    return hash32(seed, position, 0) >> 24


class NullTarget:
    """TargetEngine of no weights."""

    def __init__(self, slots: int = 256, slot_tokens: int = 4096) -> None:
        self._info = EngineInfo(
            "null",
            "null",
            "exact",
            N_VOCAB,
            frozenset({EOS}),
            slots,
            slot_tokens,
            slots * slot_tokens,
            1 << 20,
            DIGEST,
        )
        self.constraints = SlotTrackers()

    @property
    def info(self) -> EngineInfo:
        """The engine's shape."""
        return self._info

    def run(self, batch: Sequence[Slice]) -> list[SliceResult]:
        """Choose tokens, in no time."""
        return [self._run(s) if s.sample else SliceResult(s.session) for s in batch]

    def queue(self, depth: int) -> StepQueue:
        """Steps run one at a time."""
        return OneAtATime(self, depth)

    def copy(self, copy: Copy) -> None:
        """There is nothing to copy."""

    def close(self) -> None:
        """There is nothing to free."""

    def _run(self, s: Slice) -> SliceResult:
        return agreeing(s, null_token, s.sampling.seed, self.constraints, N_VOCAB)


class ByteTokenizer:
    """Tokenizer of bytes, for the null engine."""

    n_vocab = N_VOCAB
    eos = frozenset({EOS})
    bos_token = ""
    eos_token = "<|end|>"
    chat_template = None
    controls: frozenset[str] = frozenset()

    def __init__(self) -> None:
        self.fingerprint = vocabulary_fingerprint((i, bytes([i])) for i in range(256))

    def encode(
        self,
        text: str,
        *,
        add_bos: bool,
        parse_special: bool,
        stand_ins: StandIns = NO_STAND_INS,
        check: Check = unasked,
    ) -> list[int]:
        """UTF-8 bytes."""
        return list(text.translate(stand_ins).encode("utf-8", "replace"))

    def fewest(self, text: str) -> int:
        """No character is less than a byte."""
        return len(text)

    def piece(self, token: int) -> bytes:
        """The byte."""
        return bytes([token]) if 0 <= token < 256 else b""

    def blob(self) -> bytes:
        """Nothing: no edge needs it."""
        return b""
