"""OpenAI's response objects, as plain dicts: what all answers have in common (`api.formats` has their shapes).

Extensions: `metrics.speculative_decoding`, in the shape that vLLM has it, and `metrics.seed`, with which the same
request gives the same text again; `wisp`, where it was asked for (`api.extras`).
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

import msgspec

from wisp.api.backend import Target
from wisp.api.output import Output, together

Json = dict[str, Any]

_STARTED = int(time.time())


class Head(msgspec.Struct, frozen=True):
    """What all objects of one response share."""

    id: str
    created: int
    model: str
    system_fingerprint: str


def new_head(name: str, target: Target) -> Head:
    """`name`: what the client calls the model."""
    return Head(
        id=uuid.uuid4().hex,
        created=int(time.time()),
        model=name,
        system_fingerprint=f"wisp-{target.digest[:12]}",
    )


def usage(prompt_tokens: int, outputs: Sequence[Output], n: int = 1) -> Json:
    """`usage`. A prompt counts once, however many answers it has (`n`). Draft tokens that were rejected cost the client
    nothing and are not among completion_tokens."""
    completion = sum(o.tokens for o in outputs)
    rejected = sum(o.spec.num_draft_tokens - o.spec.num_accepted_draft_tokens for o in outputs)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": prompt_tokens + completion,
        "prompt_tokens_details": {"cached_tokens": sum(o.cached for o in outputs[::n])},
        "completion_tokens_details": {
            "accepted_prediction_tokens": sum(o.shown_draft for o in outputs),
            "rejected_prediction_tokens": rejected,
            "reasoning_tokens": sum(o.reasoning for o in outputs),
        },
    }


def metrics(seeds: Sequence[int], outputs: Sequence[Output]) -> Json:
    """`metrics`: how speculation went, and the seed; of several choices, the seed of each."""
    found: Json = {"seed": seeds[0], "speculative_decoding": together(outputs).report()}
    if len(seeds) > 1:
        found["seeds"] = list(seeds)
    return found


def model_object(target: Target, name: str) -> Json:
    """One model under one of its names; `max_model_len` is vLLM's extension."""
    return {
        "id": name,
        "object": "model",
        "created": _STARTED,
        "owned_by": "wisp",
        "max_model_len": target.context,
        **({"root": target.model} if name != target.model else {}),
    }


def model_list(target: Target, aliases: Sequence[str] = ()) -> Json:
    names = dict.fromkeys((target.model, *aliases))
    return {"object": "list", "data": [model_object(target, name) for name in names]}
