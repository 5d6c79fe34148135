"""From what a client asks for to a generation in token ids: template, tokenizer, what fits the context.

Rendering and encoding a long prompt takes milliseconds, so this is called in a worker thread.
"""

from __future__ import annotations

from wisp.api.backend import Generation, Target
from wisp.api.errors import context_length_exceeded
from wisp.api.fields import refuse
from wisp.api.requests import Ask
from wisp.api.template import chat_template
from wisp.engines.base import Tokenizer


def prepare(ask: Ask, target: Target, *, request_id: str, key: str) -> Generation:
    """Raises RequestError 400 where the prompt is empty, invalid or too long."""
    prompt = prompt_ids(ask, target.tokenizer)
    return Generation(
        prompt=prompt,
        sampling=ask.sampling,
        max_tokens=_max_tokens(ask, len(prompt), target.context),
        ignore_eos=ask.ignore_eos,
        logprobs=ask.logprobs,
        slo=ask.slo,
        digest=target.digest,
        request_id=request_id,
        key=key,
    )


def prompt_ids(ask: Ask, tokenizer: Tokenizer) -> list[int]:
    """The prompt in token ids. A template writes its own beginning of sequence; plain text does not."""
    if ask.chat:
        return tokenizer.encode(_chat_text(ask, tokenizer), add_bos=False, parse_special=True)
    if isinstance(ask.prompt, str):
        ids = tokenizer.encode(ask.prompt, add_bos=True, parse_special=False)
    else:
        ids = ask.prompt
        if ids and not 0 <= min(ids) <= max(ids) < tokenizer.n_vocab:
            refuse("prompt", f"expected token ids from 0 to {tokenizer.n_vocab - 1}")
    if not ids:
        refuse("prompt", "expected at least one token")
    return ids


def _chat_text(ask: Ask, tokenizer: Tokenizer) -> str:
    return chat_template(tokenizer.chat_template).render(
        ask.messages,
        tools=ask.tools,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        args=ask.template_args,
    )


def _max_tokens(ask: Ask, prompt: int, context: int) -> int:
    left = context - prompt
    param = "messages" if ask.chat else "prompt"
    if left < 1:
        raise context_length_exceeded(context, prompt, 0, param)
    if ask.max_tokens is None:
        return left
    if ask.clamp:
        return min(ask.max_tokens, left)
    if ask.max_tokens > left:
        raise context_length_exceeded(context, prompt, ask.max_tokens, param)
    return ask.max_tokens
