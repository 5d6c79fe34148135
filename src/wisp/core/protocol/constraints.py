"""Constraints on the target's choice: bias, penalties, allowed and banned tokens, grammars.

Order, at each position, on the raw logits, each in float64 and rounded to float32:

1. the grammar's mask, `allowed`, `banned`: an id outside of any of them cannot be chosen
2. `logit_bias` is added
3. `repetition_penalty`: a score of an id that prompt or output has is divided by it if positive, else multiplied
4. `frequency_penalty` x (times in the output) and `presence_penalty` (if in the output) are subtracted

A restriction that would leave no id at all at a position is passed over there. What a position sees are the tokens
before it, whether they are committed or drafted: so along a draft each position sees what plain decoding would have
seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import msgspec

# Bounds, so that an Open stays within a frame (`messages.FRAME_EXTRA`) and a position's work stays small.
MOST_BIASES = 1024
MOST_ALLOWED = 16_384
MOST_BANNED = 4096  # ids in all sequences
MOST_STOPS = 256
MOST_AFTER = 64
MOST_SOURCE = 1 << 16  # bytes

Kind = Literal["json_object", "json_schema", "regex", "choice", "lark", "tokens"]


class Grammar(msgspec.Struct, frozen=True, array_like=True, weakref=True):
    """What the text must be, from its beginning or from the end of the reasoning on.

    kind, source: "json_object" (source "": any JSON object), "json_schema" (source: the schema, JSON), "regex" (the
                  whole text matches), "choice" (source: a JSON list of strings), "lark" (llguidance's dialect),
                  "tokens" (exactly these: a JSON list of ids)
    after:        the token ids, in order, that end the reasoning; the grammar begins behind the first place in the
                  output that has them, or their text where all are text (`reasoning`). (): at once

    Once the text is complete only ends of sequence can follow, again and again if they are ignored.
    """

    kind: Kind
    source: str = ""
    after: tuple[int, ...] = ()

    def problem(self) -> str:
        """What is wrong with it, or ""."""
        if len(self.source.encode("utf-8", "replace")) > MOST_SOURCE:
            return f"must be at most {MOST_SOURCE} bytes long"
        if len(self.after) > MOST_AFTER:
            return f"may begin after at most {MOST_AFTER} tokens"
        return "" if self.source or self.kind == "json_object" else "must not be empty"


class Constraints(msgspec.Struct, frozen=True, array_like=True):
    """All that a request may ask for, everything off by default.

    logit_bias:         (id, what is added to its logit, -100 to 100)
    frequency_penalty, presence_penalty: over the output, -2 to 2, 0 is off
    repetition_penalty: over prompt and output, 1 is off
    banned:             sequences of ids: the last of one cannot follow the others, as far as they are output
    allowed:            ids that can be chosen; None: all. Ends of sequence are no exception
    stop_token_ids:     ids that end the generation, like an end of sequence, even where those are ignored
    """

    logit_bias: tuple[tuple[int, float], ...] = ()
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    banned: tuple[tuple[int, ...], ...] = ()
    allowed: tuple[int, ...] | None = None
    stop_token_ids: tuple[int, ...] = ()
    grammar: Grammar | None = None

    @property
    def counting(self) -> bool:
        """Do scores depend on what the output has?"""
        return bool(self.frequency_penalty or self.presence_penalty) or self.repetition_penalty != 1.0

    @property
    def choosing(self) -> bool:
        """Is there anything that changes which token is chosen?"""
        return bool(
            self.logit_bias
            or self.banned
            or self.allowed is not None
            or self.grammar is not None
            or self.counting
        )

    def ids(self) -> Iterator[int]:
        """All ids that are named."""
        yield from (token for token, _ in self.logit_bias)
        for some in (*self.banned, self.allowed or (), self.stop_token_ids):
            yield from some
        if self.grammar is not None:
            yield from self.grammar.after

    def problem(self) -> tuple[str, str] | None:
        """(parameter, what is wrong with it), or None if all is in range."""
        if len(self.logit_bias) > MOST_BIASES:
            return "logit_bias", f"must have at most {MOST_BIASES} entries"
        if not all(-100.0 <= bias <= 100.0 for _, bias in self.logit_bias):
            return "logit_bias", "must be between -100 and 100 for each id"
        if len({token for token, _ in self.logit_bias}) < len(self.logit_bias):
            return "logit_bias", "must name each id once"
        for name in ("frequency_penalty", "presence_penalty"):
            if not -2.0 <= getattr(self, name) <= 2.0:
                return name, "must be between -2 and 2"
        if not 0.01 <= self.repetition_penalty <= 100.0:
            return "repetition_penalty", "must be between 0.01 and 100"
        if not all(self.banned) or sum(map(len, self.banned)) > MOST_BANNED:
            return (
                "bad_words",
                f"must be sequences of at least one token, and at most {MOST_BANNED} tokens in all",
            )
        if self.allowed is not None and not 1 <= len(self.allowed) <= MOST_ALLOWED:
            return "allowed_token_ids", f"must name 1 to {MOST_ALLOWED} ids"
        if len(self.stop_token_ids) > MOST_STOPS:
            return "stop_token_ids", f"must name at most {MOST_STOPS} ids"
        if any(token < 0 for token in self.ids()):
            return "token ids", "must not be negative"
        wrong = self.grammar.problem() if self.grammar is not None else ""
        return ("grammar", wrong) if wrong else None
