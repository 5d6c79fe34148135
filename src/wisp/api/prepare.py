"""From what a client asks for to a generation in token ids: template, tokenizer, what fits the context.

A long prompt takes a good part of a second, so `PromptWork` does this in threads of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar
from weakref import WeakValueDictionary

import msgspec

from wisp.api.backend import Generation, Target
from wisp.api.errors import context_length_exceeded, too_long
from wisp.api.fields import refuse
from wisp.api.guard import guard
from wisp.api.requests import GenerationRequest
from wisp.api.template import chat_template
from wisp.engines.base import Check, Tokenizer, unasked
from wisp.engines.special import NO_STAND_INS, StandIns

T = TypeVar("T")

THREADS = 4  # for work on prompts
AT_ONCE = 2  # prompts of one key being worked on; its others wait, so that it does not hold every thread


def prepare(
    ask: GenerationRequest, target: Target, request_id: str = "", key: str = "", check: Check = unasked
) -> Generation:
    """Raises RequestError 400 where the prompt is empty, invalid or too long, and what `check` raises."""
    prompt = prompt_ids(ask, target, check)
    max_tokens = _max_tokens(ask, len(prompt), target.context)
    if ask.min_tokens > max_tokens:
        refuse("min_tokens", f"expected at most as many as the answer may have here, {max_tokens}")
    sampling = ask.sampling
    if ask.min_tokens and not ask.ignore_eos:
        sampling = msgspec.structs.replace(sampling, min_tokens=ask.min_tokens).ending(target.tokenizer.eos)
    return Generation(
        prompt=prompt,
        sampling=sampling,
        max_tokens=max_tokens,
        ignore_eos=ask.ignore_eos,
        logprobs=ask.logprobs,
        slo=ask.slo,
        digest=target.digest,
        request_id=request_id,
        key=key,
        extras=ask.extras,
    )


def prompt_ids(ask: GenerationRequest, target: Target, check: Check = unasked) -> list[int]:
    """The prompt in token ids.

    Special tokens count as such in a raw prompt and in what the template writes, but not in what a client puts
    into a message. A template writes its own beginning of sequence; plain text need not.
    """
    tokenizer = target.tokenizer
    if ask.chat:
        text, stand_ins = _chat_text(ask, tokenizer)
    elif isinstance(ask.prompt, str):
        text, stand_ins = ask.prompt, NO_STAND_INS
    else:
        return _checked(ask.prompt, tokenizer)
    if (fewest := tokenizer.fewest(text.translate(stand_ins))) >= target.context:
        raise too_long(target.context, fewest, _param(ask))
    ids = tokenizer.encode(text, add_bos=not ask.chat, parse_special=True, stand_ins=stand_ins, check=check)
    return ids or refuse(_param(ask), "expected at least one token")


def _checked(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    if not ids:
        refuse("prompt", "expected at least one token")
    if not 0 <= min(ids) <= max(ids) < tokenizer.n_vocab:
        refuse("prompt", f"expected token ids from 0 to {tokenizer.n_vocab - 1}")
    return ids


def _chat_text(ask: GenerationRequest, tokenizer: Tokenizer) -> tuple[str, StandIns]:
    """The text, and what stands for what in the parts of it that came from the client."""
    guarded = guard(tokenizer.chat_template, tokenizer.controls)
    messages, tools, args, stand_ins = guarded(ask.messages, ask.tools, ask.template_args)
    text = chat_template(tokenizer.chat_template).render(
        messages,
        tools=tools,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        args=args,
        stand_ins=stand_ins,
    )
    return text, stand_ins


def _param(ask: GenerationRequest) -> str:
    return "messages" if ask.chat else "prompt"


def _max_tokens(ask: GenerationRequest, prompt: int, context: int) -> int:
    left = context - prompt
    if left < 1:
        raise context_length_exceeded(context, prompt, 0, _param(ask))
    if ask.max_tokens is None:
        return left
    if ask.clamp:
        return min(ask.max_tokens, left)
    if ask.max_tokens > left:
        raise context_length_exceeded(context, prompt, ask.max_tokens, _param(ask))
    return ask.max_tokens


class PromptWork:
    """Work on prompts: in a few threads, for each key a few at a time, and only as long as someone waits for it."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="prompt")
        self._turns: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    async def run(self, key: str, admit: Callable[[], object], work: Callable[[Check], T]) -> T:
        """The result of `work`, which is to call the check it is given now and then: once this is cancelled, that
        raises. `admit` is called when it is the key's turn, and may raise."""
        turn = self._turns.setdefault(key, asyncio.Semaphore(AT_ONCE))
        await turn.acquire()
        loop = asyncio.get_running_loop()
        given_up = threading.Event()

        def check() -> None:
            if given_up.is_set():
                raise asyncio.CancelledError

        def over(_: Future[T]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended before the thread has
                loop.call_soon_threadsafe(turn.release)

        try:
            admit()
            future = self._threads.submit(work, check)
        except BaseException:
            turn.release()
            raise
        future.add_done_callback(over)  # a thread that is not wanted any more still takes up its place
        try:
            return await asyncio.wrap_future(future)
        finally:
            given_up.set()
