"""Endpoints for tokens: text to ids and back, as vLLM (`prompt`, `messages`) and llama.cpp (`content`) have them, and
the length of a prompt, as Anthropic has it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from wisp.api.backend import Target
from wisp.api.errors import too_long
from wisp.api.fields import Fields, refuse
from wisp.api.params import Json
from wisp.api.prepare import prompt_ids
from wisp.api.render import render
from wisp.api.requests import GenerationRequest, parse_chat
from wisp.api.responses import Json as Answer
from wisp.api.spelling import written
from wisp.engines.base import Check, Tokenizer


def tokenize(body: Json, target: Target, check: Check) -> Answer:
    """`/tokenize`. Raises RequestError 400."""
    fields, tokenizer = Fields(body), target.tokenizer
    if body.get("messages") is not None:
        tokens = prompt_ids(_asked(body), target, check)
    else:
        name = "content" if body.get("content") is not None else "prompt"
        text = fields.string(name)
        if text is None:
            refuse("prompt", "expected a string; or give messages")
        if (fewest := tokenizer.fewest(text)) >= target.context:
            raise too_long(target.context, fewest, name)
        option, default = ("add_special", False) if name == "content" else ("add_special_tokens", True)
        add = default if body.get(option) is None else fields.flag(option)
        tokens = tokenizer.encode(text, add_bos=add, parse_special=True, check=check)
    found: Answer = {"tokens": tokens, "count": len(tokens), "max_model_len": target.context}
    if fields.flag("return_token_strs"):
        found["token_strs"] = [written(tokenizer, t).decode("utf-8", "replace") for t in tokens]
    if fields.flag("with_pieces"):
        found["tokens"] = list(_with_pieces(tokens, tokenizer))
    return found


def _with_pieces(tokens: list[int], tokenizer: Tokenizer) -> Iterator[Answer]:
    """Each token with its text, as llama.cpp tells it: in bytes where they are no text by themselves."""
    for token in tokens:
        piece = written(tokenizer, token)
        try:
            yield {"id": token, "piece": piece.decode()}
        except UnicodeDecodeError:
            yield {"id": token, "piece": list(piece)}


def detokenize(body: Json, target: Target, check: Check) -> Answer:
    """`/detokenize`. Raises RequestError 400."""
    tokens: list[Any] = Fields(body).list("tokens")
    tokenizer = target.tokenizer
    if not all(type(t) is int and 0 <= t < tokenizer.n_vocab for t in tokens):
        refuse("tokens", f"expected a list of token ids from 0 to {tokenizer.n_vocab - 1}")
    text = b"".join(written(tokenizer, t) for t in tokens).decode("utf-8", "replace")
    return {"prompt": text, "content": text}


def tokenizer_info(target: Target) -> Answer:
    """`/tokenizer_info`, as lm-eval asks for it."""
    tokenizer = target.tokenizer
    return {
        "tokenizer_class": type(tokenizer).__name__,
        "bos_token": tokenizer.bos_token or None,
        "eos_token": tokenizer.eos_token or None,
        "chat_template": tokenizer.chat_template,
        "model_max_length": target.context,
    }


def apply_template(body: Json, target: Target, check: Check) -> Answer:
    """`/apply-template`: the prompt that a chat becomes. Raises RequestError 400."""
    rendered = render(_asked(body), target.tokenizer)
    return {"prompt": rendered.text.translate(rendered.stand_ins)}


def _asked(body: Json) -> GenerationRequest:
    return parse_chat(body, {})
