"""Bodies of `/v1/chat/completions` and `/v1/completions`, checked and brought into one neutral shape.

Whatever would change the text and is not implemented is refused by name; unknown fields are ignored, as
clients of many servers send them. Defaults are OpenAI's. Extensions, in vLLM's names: `top_k`, `min_p`,
`min_tokens`, `ignore_eos`, `chat_template_kwargs`; and our own `wisp` (`api.extras`).
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

import msgspec

from wisp.api.extras import Extras, parse_extras
from wisp.api.fields import Fields, refuse
from wisp.api.messages import Message, parse_messages, parse_tools
from wisp.core.protocol.sampling import Sampling
from wisp.core.protocol.slo import LONGEST_MS, Slo

SloClasses = Mapping[str, Slo]
NO_CLASSES: SloClasses = {}
MAX_STOPS = 4
MAX_STOP_CHARS = 1024
_MAX_COUNT = 1 << 31
_SEED_BITS = 53  # a client whose numbers are doubles must be able to read the seed and send it back
_DEFAULT_COMPLETION_TOKENS = 16

# Values (besides null) at which an unimplemented parameter changes nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "use_beam_search": (False,),
    "stop_token_ids": ([],),
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "logits_processors": ([],),
    "prompt_logprobs": (),
    "grammar": ("",),
    "json_schema": (),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "response_format": ({"type": "text"},),
}
_NEUTRAL_CHAT = _NEUTRAL | {
    "modalities": (["text"], []),
    "audio": (),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "web_search_options": (),
    "chat_template": (),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
}
_NEUTRAL_COMPLETION = _NEUTRAL | {"suffix": ("",), "prompt_embeds": ()}


class GenerationRequest(msgspec.Struct, frozen=True):
    """What a client asks for.

    Chat: `messages`, `tools` and `template_args` are set. Completion: `prompt`, text or token ids.
    max_tokens: None means "what is left of the context". `clamp`: the client did not say how many, so the
    default may shrink to what is left. logprobs: None, or how many alternatives to report per token.
    """

    chat: bool
    model: str
    sampling: Sampling
    prompt: str | list[int] = ""
    messages: list[Message] = []
    tools: list[Message] = []
    template_args: dict[str, Any] = {}
    max_tokens: int | None = None
    clamp: bool = False
    stop: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False
    logprobs: int | None = None
    ignore_eos: bool = False
    min_tokens: int = 0
    slo: Slo | None = None
    slo_class: str = ""
    extras: Extras = Extras()


def parse_chat(
    body: dict[str, Any], headers: Mapping[str, str], classes: SloClasses = NO_CLASSES
) -> GenerationRequest:
    """The body of `/v1/chat/completions`. Raises RequestError 400 with `param`."""
    fields = Fields(body)
    common = _common(fields, headers, classes, _NEUTRAL_CHAT)
    limit_name = "max_tokens" if fields.get("max_completion_tokens") is None else "max_completion_tokens"
    return GenerationRequest(
        chat=True,
        messages=parse_messages(fields),
        tools=parse_tools(fields),
        template_args=fields.object("chat_template_kwargs"),
        max_tokens=fields.integer(limit_name, 1, _MAX_COUNT),
        logprobs=_chat_logprobs(fields),
        **common,
    )


def parse_completion(
    body: dict[str, Any], headers: Mapping[str, str], classes: SloClasses = NO_CLASSES
) -> GenerationRequest:
    """The body of `/v1/completions`. Raises RequestError 400 with `param`."""
    fields = Fields(body)
    common = _common(fields, headers, classes, _NEUTRAL_COMPLETION)
    max_tokens = fields.integer("max_tokens", 1, _MAX_COUNT)
    return GenerationRequest(
        chat=False,
        prompt=_prompt(fields.get("prompt")),
        max_tokens=_DEFAULT_COMPLETION_TOKENS if max_tokens is None else max_tokens,
        clamp=max_tokens is None,
        logprobs=None if fields.get("logprobs") is False else fields.integer("logprobs", 0, 5),
        **common,
    )


def _common(
    fields: Fields, headers: Mapping[str, str], classes: SloClasses, neutral: dict[str, tuple[Any, ...]]
) -> dict[str, Any]:
    """The fields of GenerationRequest that both endpoints have."""
    model = fields.string("model")
    if not model:
        refuse("model", "expected the name of a model; GET /v1/models lists them")
    _refuse_unsupported(fields, neutral)
    stream = fields.flag("stream")
    return {
        "model": model,
        "sampling": _sampling(fields),
        "stop": _stop(fields.get("stop")),
        "stream": stream,
        "include_usage": _include_usage(fields, stream),
        "ignore_eos": fields.flag("ignore_eos"),
        "min_tokens": fields.integer("min_tokens", 0, _MAX_COUNT) or 0,
        "slo": parse_slo(headers, classes),
        "slo_class": headers.get("x-slo-class") or "",
        "extras": parse_extras(fields),
    }


def _refuse_unsupported(fields: Fields, neutral: dict[str, tuple[Any, ...]]) -> None:
    for name, accepted in neutral.items():
        value = fields.get(name)
        if value is None or any(_same(value, a) for a in accepted):
            continue
        only = " or ".join(msgspec.json.encode(a).decode() for a in accepted)
        refuse(name, f"not supported{f' (only {only} is)' if only else ''}", "unsupported_parameter")


def _same(value: object, other: object) -> bool:
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def _sampling(fields: Fields) -> Sampling:
    top_k = fields.integer("top_k", -1, _MAX_COUNT) or 0
    seed = fields.integer("seed", -(1 << 63), (1 << 64) - 1)
    sampling = Sampling(
        temperature=fields.number("temperature", 1.0),
        top_k=max(top_k, 0),  # -1 is how vLLM says "off"
        top_p=fields.number("top_p", 1.0),
        min_p=fields.number("min_p", 0.0),
        seed=secrets.randbits(_SEED_BITS) if seed is None else seed,
    )
    if problem := sampling.problem():
        refuse(*problem)
    return sampling


def _stop(stop: object) -> tuple[str, ...]:
    if stop is None:
        return ()
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or not all(isinstance(s, str) for s in stops):
        refuse("stop", "expected a string or a list of strings")
    stops = [s for s in stops if s]  # peers take an empty one as none
    if len(stops) > MAX_STOPS:
        refuse("stop", f"expected at most {MAX_STOPS} strings, got {len(stops)}")
    if not all(len(s) <= MAX_STOP_CHARS for s in stops):
        refuse("stop", f"expected strings of at most {MAX_STOP_CHARS} characters")
    return tuple(stops)


def _include_usage(fields: Fields, stream: bool) -> bool:
    options = fields.object("stream_options")
    if options and not stream:
        refuse("stream_options", "only allowed where stream is true")
    return Fields(options, "stream_options").flag("include_usage")


def _chat_logprobs(fields: Fields) -> int | None:
    wanted = fields.flag("logprobs")
    top = fields.integer("top_logprobs", 0, 20) or 0
    if top and not wanted:
        refuse("top_logprobs", "only allowed where logprobs is true")
    return top if wanted else None


def _prompt(prompt: object) -> str | list[int]:
    """Text, token ids, or a list of exactly one of these."""
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], (str, list)):
        if len(prompt) > 1:
            refuse("prompt", f"one prompt per request is supported, got a list of {len(prompt)}")
        prompt = prompt[0]
    if isinstance(prompt, str):
        return prompt
    # `type(t) is int` leaves out booleans, which are ints to Python
    if isinstance(prompt, list) and all(type(t) is int for t in prompt):
        return prompt
    return refuse("prompt", "expected a string or a list of token ids")


def parse_slo(headers: Mapping[str, str], classes: SloClasses = NO_CLASSES) -> Slo | None:
    """Targets from `x-slo-ttft-ms` and `x-slo-tpot-ms`, and where these say nothing from the class that `x-slo-class`
    names; None where none is given."""
    ttft, tpot = (_target_ms(headers, name) for name in ("x-slo-ttft-ms", "x-slo-tpot-ms"))
    if name := headers.get("x-slo-class"):
        if name not in classes:
            known = f"; this server has {', '.join(sorted(classes))}" if classes else "; this server has none"
            refuse("x-slo-class", f"no such SLO class{known}")
        ttft, tpot = ttft or classes[name].ttft_ms, tpot or classes[name].tpot_ms
    return Slo(ttft, tpot) if ttft or tpot else None


def _target_ms(headers: Mapping[str, str], name: str) -> float:
    text = headers.get(name)
    if text is None:
        return 0.0
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value <= LONGEST_MS:  # also false for nan
        refuse(name, f"expected milliseconds, more than 0 and at most {LONGEST_MS:.0e}")
    return value
