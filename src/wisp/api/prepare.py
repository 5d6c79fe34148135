"""From a parsed request to a generation in token ids: template, tokenizer, the context's limit.

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
from wisp.api.constrain import constrained, fill_in, read_and_constrain
from wisp.api.errors import context_length_exceeded, too_long
from wisp.api.fields import refuse
from wisp.api.reader import Reading
from wisp.api.render import render
from wisp.api.requests import GenerationRequest, Prompt
from wisp.core.errors import GrammarBusyError, GrammarError, RequestError
from wisp.core.protocol.sampling import Sampling
from wisp.core.protocol.step import INVALID_GRAMMAR
from wisp.engines.base import Check, Tokenizer, unasked
from wisp.engines.special import NO_STAND_INS, StandIns

T = TypeVar("T")

THREADS = 4  # for work on prompts
AT_ONCE = 2  # prompts of one key being worked on; its others wait, so that it does not hold every thread


class Prepared(msgspec.Struct, frozen=True):
    """A request in token ids: one generation for each answer, `n` for each prompt in turn.

    reading: how to read a chat's answers, None for text as it is
    n:       answers to each prompt
    """

    generations: list[Generation]
    reading: Reading | None = None
    prompt_tokens: int = 0
    n: int = 1


def prepare(
    ask: GenerationRequest,
    target: Target,
    request_id: str = "",
    key: str = "",
    check: Check = unasked,
    parser: str = "",
    trace: str = "",
) -> Prepared:
    """Raises RequestError 400 where a prompt is empty, invalid or too long, and what `check` raises. `parser`: the
    name of the family that reads answers; "" for that of the template. `trace`: of the request, for its sessions."""
    rendered = None
    if ask.chat:
        rendered = render(ask, target.tokenizer)
        prompts = [_encoded(rendered.text, rendered.stand_ins, ask, target, check)]
    else:
        prompts = [_completion_ids(prompt, ask, target, check) for prompt in ask.prompts]
    reading, sampling = None, ask.sampling
    if rendered is not None:
        reading, sampling = read_and_constrain(ask, rendered, target.tokenizer, parser)
    sampling = constrained(sampling, ask, target.tokenizer)
    _compile(sampling, ask, target, key)
    generations = [
        Generation(
            prompt=prompt,
            sampling=derived(sampling, i),
            max_tokens=max_tokens,
            ignore_eos=ask.ignore_eos,
            logprobs=ask.logprobs,
            slo=ask.slo,
            digest=target.digest,
            trace=trace,
            request_id=request_id,
            key=key,
            extras=ask.extras,
        )
        for prompt, max_tokens in ((p, _max_tokens(ask, len(p), target.context)) for p in prompts)
        for i in range(ask.n)
    ]
    return Prepared(generations, reading, sum(map(len, prompts)), ask.n)


def _compile(sampling: Sampling, ask: GenerationRequest, target: Target, key: str) -> None:
    """Compile the grammar where that can be done here, so that a bad one is refused by the parameter it came from.

    Raises RequestError 400, or 503 where the grammar is not to blame.
    """
    constraints = sampling.constraints
    if constraints is None or constraints.grammar is None or target.grammars is None:
        return
    try:
        target.grammars.compile(constraints.grammar, key)
    except GrammarBusyError as error:
        raise RequestError(503, str(error), code="overloaded", type="server_error", retry_after=1.0) from None
    except GrammarError as error:
        param = "tool_choice" if ask.use.forced else ask.asked.param if ask.asked is not None else "tools"
        refuse(param, str(error), INVALID_GRAMMAR)


def derived(sampling: Sampling, answer: int) -> Sampling:
    """The sampling of one of several answers to a prompt: its seed is the request's, plus its index."""
    if not answer:
        return sampling
    seed = sampling.seed + answer
    return msgspec.structs.replace(sampling, seed=seed if seed < 1 << 64 else seed - (1 << 64))


def prompt_ids(ask: GenerationRequest, target: Target, check: Check = unasked) -> list[int]:
    """The only prompt in token ids.

    Special tokens count as such in a raw prompt and in what the template writes, but not in what a client puts
    into a message. A template writes its own beginning of sequence; plain text need not.
    """
    if ask.chat:
        rendered = render(ask, target.tokenizer)
        return _encoded(rendered.text, rendered.stand_ins, ask, target, check)
    return _completion_ids(ask.prompts[0], ask, target, check)


def _completion_ids(prompt: Prompt, ask: GenerationRequest, target: Target, check: Check) -> list[int]:
    if not isinstance(prompt, str):
        return _checked(prompt, target.tokenizer)
    if ask.suffix:
        return fill_in(prompt, ask.suffix, target, check)
    return _encoded(prompt, NO_STAND_INS, ask, target, check)


def _encoded(
    text: str, stand_ins: StandIns, ask: GenerationRequest, target: Target, check: Check
) -> list[int]:
    tokenizer = target.tokenizer
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


def _param(ask: GenerationRequest) -> str:
    return "messages" if ask.chat else "prompt"


def _max_tokens(ask: GenerationRequest, prompt: int, context: int) -> int:
    """What the answer may have: what was asked for, or what is left of the context if that is less."""
    left = context - prompt
    if left < 1:
        raise context_length_exceeded(context, prompt, 0, _param(ask))
    most = left if ask.max_tokens is None else min(ask.max_tokens, left)
    if ask.min_tokens > most:
        refuse("min_tokens", f"expected at most as many as the answer may have here, {most}")
    return most


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
