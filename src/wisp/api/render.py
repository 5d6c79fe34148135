"""A chat's prompt as text: the guard, the template, and an answer that the client has begun."""

from __future__ import annotations

import msgspec

from wisp.api.fields import refuse
from wisp.api.guard import guard
from wisp.api.requests import GenerationRequest
from wisp.api.template import chat_template
from wisp.engines.base import Tokenizer
from wisp.engines.special import StandIns

_MARK = "\ufdd0wisp\ufdd1"  # noncharacters: no text has them. It stands where the begun answer ends


class Rendered(msgspec.Struct, frozen=True):
    """The prompt, what stands for what in the client's parts of it, and the beginning of the answer, if it is the
    client's."""

    text: str
    stand_ins: StandIns
    begun: str = ""


def render(ask: GenerationRequest, tokenizer: Tokenizer) -> Rendered:
    """Raises RequestError 400 where the template refuses the messages."""
    messages, begun = ask.messages, ""
    if ask.prefill:
        last = messages[-1]
        begun = last.get("content") or ""
        if last["role"] != "assistant" or "tool_calls" in last:
            refuse(
                "continue_final_message", "only allowed where the last message is the assistant's, and text"
            )
        messages = [*messages[:-1], {**last, "content": begun + _MARK}]
    guarded = guard(tokenizer.chat_template, tokenizer.controls)
    messages, tools, args, stand_ins = guarded(messages, ask.tools, ask.template_args)
    text = chat_template(tokenizer.chat_template).render(
        messages,
        tools=tools,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        args=args,
        stand_ins=stand_ins,
        open_end=ask.prefill or ask.open_end,
    )
    if ask.prefill:
        text, mark, _ = text.rpartition(_MARK)
        if not mark:
            refuse(
                "continue_final_message", "this model's chat template does not show the last message as it is"
            )
    return Rendered(text, stand_ins, begun)
