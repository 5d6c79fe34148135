"""The bodies of the generating endpoints as types: what each parameter may be, in one place.

Null is as good as absent, as with OpenAI. Fields that no type here has are ignored, as clients of many servers send
them, but those of `REFUSED`: they change the text on some server, and are not implemented.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from wisp.api.fields import kind, refuse

MAX_COUNT = 1 << 31
MAX_CHOICES = 128  # generations of one request
MAX_STOPS = 64
MAX_STOP_CHARS = 1024

S = TypeVar("S", bound=msgspec.Struct)

Count = Annotated[int, Meta(ge=1, le=MAX_COUNT)]
CountOrZero = Annotated[int, Meta(ge=0, le=MAX_COUNT)]
TokenId = Annotated[int, Meta(ge=0, le=MAX_COUNT)]
Json = dict[str, Any]

# Parameters that are refused, and the values besides null at which they change nothing.
REFUSED: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "length_penalty": (1,),
    "early_stopping": (False,),
    "use_beam_search": (False,),
    "logits_processors": ([],),
    "include_stop_str_in_output": (False,),
    "truncate_prompt_tokens": (-1,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True, False),
    "vllm_xargs": ({},),
    # llama.cpp's, Ollama's and others' ways to choose tokens
    "repeat_penalty": (1,),
    "repeat_last_n": (),
    "n_predict": (),
    "num_predict": (),
    "typical_p": (1,),
    "top_a": (0,),
    "top_n_sigma": (-1, 0),
    "tfs_z": (1,),
    "mirostat": (0,),
    "dynatemp_range": (0,),
    "dry_multiplier": (0,),
    "xtc_probability": (0,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "penalty_alpha": (0,),
    "smoothing_factor": (0,),
    "no_repeat_ngram_size": (0,),
    "guided_whitespace_pattern": (),
    "prompt_embeds": (),
    "lora": ([],),
}
REFUSED_CHAT = REFUSED | {
    "modalities": (["text"], []),
    "audio": (),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "web_search_options": (),
    "chat_template": (),
    "documents": ([],),
    "echo": (False,),
    "thinking_token_budget": (),
    "suffix": ("",),
}


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Common(msgspec.Struct, kw_only=True):
    """What both endpoints take. Defaults are OpenAI's; extensions have vLLM's names."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Annotated[int, Meta(ge=-1, le=MAX_COUNT)] | None = None
    min_p: float | None = None
    min_tokens: CountOrZero | None = None
    ignore_eos: bool | None = None
    # constraints
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[TokenId, float] | None = None
    bad_words: list[str] | None = None
    allowed_token_ids: list[TokenId] | None = None
    stop_token_ids: list[TokenId] | None = None
    # structured output, in the spellings of OpenAI, vLLM (new and old), SGLang and llama.cpp
    response_format: Json | None = None
    structured_outputs: Json | None = None
    guided_json: str | Json | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    guided_json_object: bool | None = None
    json_schema: str | Json | None = None
    regex: str | None = None
    grammar: str | None = None
    ebnf: str | None = None
    prompt_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    wisp: Json | None = None  # `api.extras`


class Chat(Common, kw_only=True):
    """`/v1/chat/completions`. `messages` and `tools` are read one by one (`api.messages`, `api.tool_choice`)."""

    messages: list[Any] | None = None
    tools: list[Any] | None = None
    tool_choice: str | Json | None = None
    parallel_tool_calls: bool | None = None
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    chat_template_kwargs: Json | None = None
    enable_thinking: bool | None = None
    reasoning_effort: str | None = None
    include_reasoning: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


class Completion(Common, kw_only=True):
    """`/v1/completions`. `prompt` is text, token ids, or a list of these."""

    prompt: Any = None
    suffix: str | None = None
    echo: bool | None = None
    max_tokens: CountOrZero | None = None
    logprobs: Annotated[int, Meta(ge=0, le=5)] | bool | None = None
    add_special_tokens: bool | None = None


def read(body: Json, type_: type[S], refused: dict[str, tuple[Any, ...]]) -> S:
    """The body as a struct. Raises RequestError 400 with `param`."""
    check_refused(body, refused)
    return convert({name: _whole(value) for name, value in body.items()}, type_)


def check_refused(body: Json, refused: dict[str, tuple[Any, ...]]) -> None:
    """Raises RequestError 400 where `body` has one of these parameters with a value that changes something."""
    for name, harmless in refused.items():
        value = body.get(name)
        if value is not None and not any(_same(value, h) for h in harmless):
            only = " or ".join(msgspec.json.encode(h).decode() for h in harmless)
            refuse(name, f"not supported{f' (only {only} is)' if only else ''}", "unsupported_parameter")


def passed_on(body: Json, own: frozenset[str], elsewhere: dict[str, str]) -> Json:
    """The parameters of a chat in the body of another surface: all but its `own`, which it reads itself.

    elsewhere: parameters of a chat that this surface says by another name. Raises RequestError 400 for these.
    """
    for name, told in elsewhere.items():
        if body.get(name) is not None:
            refuse(name, f"not taken here; say it as {told}", "unsupported_parameter")
    names = Chat.__struct_fields__
    return {name: body[name] for name in names if name not in own and body.get(name) is not None}


def convert(value: Any, type_: type[S], path: str = "") -> S:
    """A JSON value as a struct; errors name the field, below `path`. Raises RequestError 400 with `param`."""
    try:
        return msgspec.convert(value, type_, str_keys=True)
    except msgspec.ValidationError as error:
        message, _, where = str(error).partition(" - at `")
    of_key = where.startswith("key` in `")
    path_in = where.replace("key` in `", "").rstrip("`").removeprefix("$").removeprefix(".")
    of_value = path_in.endswith("[...]")  # of an object; which one is not told
    inner = value
    for name, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", path_in.removesuffix("[...]")):
        inner = inner[int(index)] if index else inner.get(name) if isinstance(inner, dict) else None
    expected, got = _plain(message)
    shown = f"{inner}" if type(inner) in (int, float) and abs(inner) < 1e18 else got or kind(inner)
    field, bracket, at = path_in.partition("[")
    param = ".".join(part for part in (path, field) if part) or "body"
    if of_key:  # all of which are strings in JSON
        return refuse(param, f"expected {expected} as every key")
    if of_value:
        return refuse(param, f"expected {expected} as every value{f', got {got}' if got else ''}")
    return refuse(param, f"expected {expected}, got {shown}{f' at {bracket}{at}' if bracket else ''}")


_WORDS = {
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "str": "a string",
    "array": "a list",
    "object": "an object",
    "null": "null",
}
_BOUND = {">=": "of at least", "<=": "of at most"}


def _plain(message: str) -> tuple[str, str]:
    """(what was expected, what came) in plain words, of msgspec's "Expected `int | null`, got `str`"."""
    found = re.fullmatch(r"Expected `([^`]*)`(?: (>=|<=) (\S+))?(?:, got `([^`]*)`)?", message)
    if found is None:
        return message[:1].lower() + message[1:], ""
    types = [_WORDS.get(t, t) for t in found[1].split(" | ") if t != "null"]
    bound = f" {_BOUND[found[2]]} {found[3]}" if found[2] else ""
    return " or ".join(types) + bound, _WORDS.get(found[4] or "", "").replace("true or false", "a boolean")


def _whole(value: Any) -> Any:
    """16.0 is an integer in JSON."""
    return int(value) if type(value) is float and value.is_integer() and abs(value) < 1e18 else value


def _same(value: object, other: object) -> bool:
    return value == other and isinstance(value, bool) == isinstance(other, bool)
