"""Constraints that bite: each is made from the text that the target says without it, so that it changes that text."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Sequence

import msgspec

from wisp.core.protocol.constraints import Constraints, Grammar
from wisp.core.protocol.sampling import Sampling

Make = Callable[[Sequence[int], random.Random], Constraints]

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "kind": {"enum": ["lamp", "fox", "bread"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "seen": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["name", "kind", "count", "seen"],
    "additionalProperties": False,
}
LARK = """
start: "<call>" NAME "(" [arg ("," arg)*] ")" "</call>"
arg: NAME "=" /[0-9]{1,3}/
NAME: /[a-z]{2,6}/
"""


def _bias(script: Sequence[int], rng: random.Random) -> Constraints:
    common = [token for token, _ in Counter(script).most_common(4)]
    return Constraints(logit_bias=tuple((token, rng.choice((-100.0, -3.0, 2.5))) for token in common))


def _penalties(script: Sequence[int], rng: random.Random) -> Constraints:
    return Constraints(frequency_penalty=rng.choice((0.4, 1.5)), presence_penalty=rng.choice((-0.3, 0.8)))


def _repetition(script: Sequence[int], rng: random.Random) -> Constraints:
    return Constraints(repetition_penalty=rng.choice((0.9, 1.3)))


def _banned(script: Sequence[int], rng: random.Random) -> Constraints:
    """Sequences of one to three tokens that would come up."""
    starts = [rng.randrange(max(1, len(script) - 3)) for _ in range(6)]
    sequences = {tuple(script[at : at + size]) for at, size in zip(starts, (1, 2, 2, 3, 3, 3), strict=True)}
    return Constraints(banned=tuple(sorted(s for s in sequences if s)))


def _allowed(script: Sequence[int], rng: random.Random) -> Constraints:
    known = sorted(set(script))
    return Constraints(allowed=tuple(sorted(rng.sample(known, max(1, len(known) * 2 // 3)))))


def _stops(script: Sequence[int], rng: random.Random) -> Constraints:
    """Ids that first come up in the middle."""
    middle = script[len(script) // 4 :] or script
    return Constraints(stop_token_ids=tuple({rng.choice(middle) for _ in range(2)}))


def _grammar(grammar: Grammar) -> Make:
    return lambda script, rng: Constraints(grammar=grammar)


def _after_reasoning(script: Sequence[int], rng: random.Random) -> Constraints:
    """A grammar that begins behind two tokens from the middle of the text, where penalties do not move them."""
    at = rng.randrange(2, max(3, min(20, len(script) - 2)))
    return Constraints(grammar=Grammar("json_schema", json.dumps(SCHEMA), tuple(script[at : at + 2])))


def _all(script: Sequence[int], rng: random.Random) -> Constraints:
    return msgspec.structs.replace(
        _bias(script, rng),
        frequency_penalty=0.5,
        repetition_penalty=1.1,
        banned=_banned(script, rng).banned,
        grammar=Grammar("json_object"),
    )


MAKERS: dict[str, Make] = {
    "logit_bias": _bias,
    "penalties": _penalties,
    "repetition_penalty": _repetition,
    "bad_words": _banned,
    "allowed_token_ids": _allowed,
    "stop_token_ids": _stops,
    "min_tokens": _stops,
    "json_object": _grammar(Grammar("json_object")),
    "json_schema": _grammar(Grammar("json_schema", json.dumps(SCHEMA))),
    "regex": _grammar(Grammar("regex", r"(Yes|No), because [a-z ]{5,40}\.( [A-Z][a-z]{2,8}\.){0,2}")),
    "choice": _grammar(Grammar("choice", json.dumps(["the lamp", "the lantern", "nothing at all"]))),
    "lark": _grammar(Grammar("lark", LARK)),
    "after_reasoning": _after_reasoning,
    "all_at_once": _all,
}


def constrain(name: str, sampling: Sampling, script: Sequence[int], rng: random.Random) -> Sampling:
    """`sampling` with the constraints of that name. `script`: the text without them."""
    least = rng.randint(10, 25) if name == "min_tokens" else 0
    return msgspec.structs.replace(sampling, constraints=MAKERS[name](script, rng), min_tokens=least)
