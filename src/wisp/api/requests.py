"""Bodies of `/v1/chat/completions` and `/v1/completions`, brought into one neutral shape.

`api.params` says what each parameter may be. What depends on more than one, or on the model, is checked from here on.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

import msgspec

from wisp.api.extras import Extras, parse_extras
from wisp.api.fields import Fields, refuse
from wisp.api.messages import Message, parse_messages
from wisp.api.naming import Names
from wisp.api.params import (
    MAX_CHOICES,
    MAX_STOP_CHARS,
    MAX_STOPS,
    REFUSED,
    REFUSED_CHAT,
    Chat,
    Common,
    Completion,
    StreamOptions,
    read,
)
from wisp.api.slo import NO_CLASSES, SloClasses, parse_slo
from wisp.api.structured import Asked, structured
from wisp.api.tool_choice import ToolUse, tool_use
from wisp.core.protocol.constraints import Constraints
from wisp.core.protocol.sampling import Sampling
from wisp.core.protocol.slo import Slo

Prompt = str | list[int]
_SEED_BITS = 53  # a client whose numbers are doubles must be able to read the seed and send it back
_DEFAULT_COMPLETION_TOKENS = 16


class GenerationRequest(msgspec.Struct, frozen=True):
    """What a client asks for.

    model:     "" for the only one
    prompts:   of a completion, text or token ids; `suffix`: what comes after the text to be filled in
    messages, tools, template_args: of a chat, as its template reads them. use: what may or must be called
    prefill:   the last message is the beginning of the answer; open_end: nothing comes after the messages
    n:         answers to each prompt; the seed of answer i is `sampling.seed` + i
    max_tokens: None means "what is left of the context", which is the most there can be in any case
    logprobs, prompt_logprobs: None, or how many alternatives to report per token
    asked:     the grammar; bad_words become token ids with the model's tokenizer
    echoed:    what the answer is to say of the request
    names:     what the client calls the parameters of this, where it calls them otherwise
    """

    chat: bool
    model: str
    sampling: Sampling
    prompts: tuple[Prompt, ...] = ("",)
    suffix: str = ""
    echo: bool = False
    messages: list[Message] = []
    tools: list[Message] = []
    use: ToolUse = ToolUse()
    template_args: dict[str, Any] = {}
    prefill: bool = False
    open_end: bool = False
    include_reasoning: bool = True
    n: int = 1
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False
    running_usage: bool = False  # in every chunk
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    ignore_eos: bool = False
    min_tokens: int = 0
    asked: Asked | None = None
    bad_words: tuple[str, ...] = ()
    slo: Slo | None = None
    slo_class: str = ""
    echoed: dict[str, Any] = {}
    names: Names = {}
    extras: Extras = Extras()


def parse_chat(
    body: dict[str, Any], headers: Mapping[str, str], classes: SloClasses = NO_CLASSES
) -> GenerationRequest:
    """The body of `/v1/chat/completions`. Raises RequestError 400 with `param`."""
    params = read(body, Chat, REFUSED_CHAT)
    use = tool_use(params)
    prefill = params.continue_final_message is True
    if prefill and params.add_generation_prompt is True:
        refuse("continue_final_message", "cannot be used together with add_generation_prompt")
    if params.prompt_logprobs is not None:
        refuse("prompt_logprobs", "only supported by /v1/completions", "unsupported_parameter")
    limit = params.max_tokens if params.max_completion_tokens is None else params.max_completion_tokens
    return GenerationRequest(
        chat=True,
        messages=parse_messages(Fields(body)),
        tools=use.shown,
        use=use,
        template_args=_template_args(params),
        prefill=prefill,
        open_end=params.add_generation_prompt is False,
        include_reasoning=params.include_reasoning is not False,
        max_tokens=limit,
        logprobs=_chat_logprobs(params),
        **_common(params, headers, classes),
    )


def parse_completion(
    body: dict[str, Any], headers: Mapping[str, str], classes: SloClasses = NO_CLASSES
) -> GenerationRequest:
    """The body of `/v1/completions`. Raises RequestError 400 with `param`."""
    params = read(body, Completion, REFUSED)
    if params.logprobs is True:
        refuse("logprobs", "expected an integer from 0 to 5")
    prompts = _prompts(params.prompt)
    common = _common(params, headers, classes)
    if len(prompts) * common["n"] > MAX_CHOICES:
        refuse("n", f"expected at most {MAX_CHOICES} answers in all, got {len(prompts) * common['n']}")
    if params.suffix and params.echo:
        refuse("suffix", "cannot be used together with echo")
    if params.suffix and not all(isinstance(p, str) for p in prompts):
        refuse("suffix", "only allowed where prompts are text")
    scores = bool(params.echo) or params.prompt_logprobs is not None
    if params.max_tokens == 0 and not scores:
        refuse("max_tokens", "0 is only allowed with echo or prompt_logprobs")
    return GenerationRequest(
        chat=False,
        prompts=prompts,
        suffix=params.suffix or "",
        echo=params.echo is True,
        max_tokens=_DEFAULT_COMPLETION_TOKENS if params.max_tokens is None else params.max_tokens,
        logprobs=None if isinstance(params.logprobs, bool) else params.logprobs,
        prompt_logprobs=params.prompt_logprobs,
        names={"messages": "prompt"},  # a verifier's link knows chats alone
        **common,
    )


def _common(params: Common, headers: Mapping[str, str], classes: SloClasses) -> dict[str, Any]:
    """The fields of GenerationRequest that both endpoints have."""
    if params.stream_options is not None and params.stream is not True:
        refuse("stream_options", "only allowed where stream is true")
    options = params.stream_options or StreamOptions()
    return {
        "model": params.model or "",
        "sampling": _sampling(params),
        "n": params.n or 1,
        "stop": _stop(params.stop),
        "stream": params.stream is True,
        "include_usage": options.include_usage is True,
        "running_usage": options.include_usage is True and options.continuous_usage_stats is True,
        "ignore_eos": params.ignore_eos is True,
        "min_tokens": params.min_tokens or 0,
        "asked": structured(params),
        "bad_words": tuple(word for word in params.bad_words or () if word.strip()),
        "slo": parse_slo(headers, classes),
        "slo_class": headers.get("x-slo-class") or "",
        "extras": parse_extras(params.wisp),
    }


def _sampling(params: Common) -> Sampling:
    seed = params.seed
    if seed is None:
        seed = secrets.randbits(_SEED_BITS)
    elif not -(1 << 63) <= seed < 1 << 64:
        refuse("seed", f"expected an integer from {-(1 << 63)} to {(1 << 64) - 1}")
    sampling = Sampling(
        temperature=_or(params.temperature, 1.0),
        top_k=max(params.top_k or 0, 0),  # -1 is how vLLM says "off"
        top_p=_or(params.top_p, 1.0),
        min_p=_or(params.min_p, 0.0),
        seed=seed,
        constraints=_constraints(params),
    )
    if problem := sampling.problem():
        refuse(*problem)
    return sampling


def _constraints(params: Common) -> Constraints | None:
    """Those that need no tokenizer; None where nothing is asked for."""
    constraints = Constraints(
        logit_bias=tuple(sorted((params.logit_bias or {}).items())),
        frequency_penalty=_or(params.frequency_penalty, 0.0),
        presence_penalty=_or(params.presence_penalty, 0.0),
        repetition_penalty=_or(params.repetition_penalty, 1.0),
        allowed=tuple(sorted(set(params.allowed_token_ids))) if params.allowed_token_ids else None,
        stop_token_ids=tuple(sorted(set(params.stop_token_ids or ()))),
    )
    return None if constraints == Constraints() else constraints


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _stop(stop: str | list[str] | None) -> tuple[str, ...]:
    stops = [stop] if isinstance(stop, str) else stop or []
    stops = [s for s in stops if s]  # peers take an empty one as none
    if len(stops) > MAX_STOPS:
        refuse("stop", f"expected at most {MAX_STOPS} strings, got {len(stops)}")
    if not all(len(s) <= MAX_STOP_CHARS for s in stops):
        refuse("stop", f"expected strings of at most {MAX_STOP_CHARS} characters")
    return tuple(stops)


def _chat_logprobs(params: Chat) -> int | None:
    top = params.top_logprobs or 0
    if top and not params.logprobs:
        refuse("top_logprobs", "only allowed where logprobs is true")
    return top if params.logprobs else None


def _template_args(params: Chat) -> dict[str, Any]:
    """`chat_template_kwargs`, and those of its arguments that have parameters of their own."""
    args: dict[str, Any] = {}
    if params.enable_thinking is not None:
        args["enable_thinking"] = params.enable_thinking
    if params.reasoning_effort is not None:
        args["reasoning_effort"] = params.reasoning_effort
        if params.reasoning_effort == "none":
            args.setdefault("enable_thinking", False)
    return args | (params.chat_template_kwargs or {})


def _prompts(prompt: Any) -> tuple[Prompt, ...]:
    """Text, token ids, or a list of these."""
    several = isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list)
    prompts = prompt if several else [prompt]
    if len(prompts) > MAX_CHOICES:
        refuse("prompt", f"expected at most {MAX_CHOICES} prompts, got {len(prompts)}")
    for one in prompts:
        # `type(t) is int` leaves out booleans, which are ints to Python
        if not isinstance(one, str) and not (isinstance(one, list) and all(type(t) is int for t in one)):
            refuse("prompt", "expected a string, a list of token ids, or a list of these")
    return tuple(prompts)
