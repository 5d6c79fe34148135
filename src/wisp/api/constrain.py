"""The parts of a request that need the tokenizer: constraints in token ids, grammars for calls, fill-in-the-middle."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from wisp.api.backend import Target
from wisp.api.errors import too_long
from wisp.api.fields import refuse
from wisp.api.reader import Family, Reading, family
from wisp.api.render import Rendered
from wisp.api.requests import GenerationRequest
from wisp.api.structured import Asked
from wisp.api.tools import forced, lark
from wisp.api.tools.harmony import CHANNEL, MESSAGE, Harmony
from wisp.api.tools.markup import Markup
from wisp.core.protocol.constraints import Constraints, Grammar
from wisp.core.protocol.sampling import Sampling
from wisp.engines.base import Check, Tokenizer

# Tokens around a prefix, a suffix and the middle, in the order in which the model reads them. With None the suffix
# comes where it stands.
_FIM = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen, CodeGemma
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # Granite
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek
    ("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>"),  # GLM
    ("<PRE>", "<SUF>", "<MID>"),  # Code Llama
)


def read_and_constrain(
    ask: GenerationRequest, rendered: Rendered, tokenizer: Tokenizer, parser: str
) -> tuple[Reading | None, Sampling]:
    """How to read a chat's answer, None for text as it is, and its sampling with the grammar that it has to follow."""
    known = family(tokenizer, parser)
    pair = known.open_thought(rendered.text)
    thinking = pair is not None or (ask.prefill and known.thinks_in(rendered.begun))
    grammar = _grammar(ask, known, thinking)
    if grammar is not None:
        after = _after(known, tokenizer, thinking, forced_call=ask.use.forced)
        grammar = msgspec.structs.replace(grammar, after=after)
    sampling = ask.sampling if grammar is None else _with(ask.sampling, grammar=grammar)
    if not (ask.use.tools or known.thinks):
        return None, sampling
    reading = Reading(
        known.parser,
        known.names,
        ask.use.tools,
        thinking,
        one_call=not ask.use.parallel,
        include_reasoning=ask.include_reasoning,
    )
    return reading, sampling


def _with(sampling: Sampling, **constraints: object) -> Sampling:
    both = msgspec.structs.replace(sampling.constraints or Constraints(), **constraints)
    return msgspec.structs.replace(sampling, constraints=both)


def _after(known: Family, tokenizer: Tokenizer, thinking: bool, *, forced_call: bool) -> tuple[int, ...]:
    """The tokens after which the grammar begins."""
    if issubclass(known.parser, Harmony):  # whose calls' grammar has the reasoning in it
        marks = "" if forced_call else f"{CHANNEL}final{MESSAGE}"
    else:
        marks = known.pairs[0][1] if thinking else ""
    return tuple(tokenizer.encode(marks, add_bos=False, parse_special=True)) if marks else ()


def _grammar(ask: GenerationRequest, known: Family, thinking: bool) -> Grammar | None:
    """The grammar of a chat's answer: a call, what was asked for, or one of both. After reasoning models write an
    empty line."""
    use, asked = ask.use, ask.asked
    if not use.tools:
        return asked.grammar if asked is not None else None
    tools = list(use.tools.values())
    strict = any(tool.strict for tool in tools)
    if not use.forced and asked is None and not strict and not use.fewer:
        return None

    def mark(marker: str) -> str:
        token = known.ids.get(marker)
        return lark.text(marker) if token is None else f"<[{token}]>"

    calls = forced.grammar(known.name, known.template, tools, parallel=use.parallel, mark=mark)
    if use.forced:
        if calls is None:
            message = f'calls in the format of this model ("{known.name}") cannot be forced; use "auto"'
            refuse("tool_choice", message, "unsupported_parameter")
        lead = '"\\n\\n"? ' if thinking else ""
        return _lark("tool_choice", f"start: {lead}calls\n{calls}")
    if asked is not None:
        return _either(asked, calls)
    openers = known.parser.openers if issubclass(known.parser, Markup) else ()
    if calls is None or not openers:
        if use.fewer:
            message = (
                f'calls in the format of this model ("{known.name}") cannot be kept to some of the tools'
            )
            refuse("tool_choice", f'{message}; use the mode "required"', "unsupported_parameter")
        return None  # arguments are checked by the client
    text, rules = forced.free_text(openers, known.ids)
    return _lark("tools", f"start: {text} calls?\n{rules}\n{calls}")


def _either(asked: Asked, calls: str | None) -> Grammar:
    """An answer as it was asked for, or a call."""
    grammar = asked.grammar
    if calls is None or grammar.kind not in ("json_object", "json_schema"):
        refuse(asked.param, "cannot be used together with tools here", "unsupported_parameter")
    schema = msgspec.json.decode(grammar.source or '{"type": "object"}')
    if schema is False:
        refuse(asked.param, "unsatisfiable: the schema is false")
    answer = lark.schema_rule({} if schema is True else schema)
    return _lark(asked.param, f"start: answer | calls\nanswer: {answer}\n{calls}")


def _lark(param: str, source: str) -> Grammar:
    grammar = Grammar("lark", f"%llguidance {{}}\n{source}\n")
    if problem := grammar.problem():
        refuse(param, problem)
    return grammar


def constrained(sampling: Sampling, ask: GenerationRequest, tokenizer: Tokenizer) -> Sampling:
    """The sampling with everything that is said in token ids. Raises RequestError 400 for ids that there are not."""
    if not ask.chat and ask.asked is not None:
        sampling = _with(sampling, grammar=ask.asked.grammar)
    if ask.bad_words:
        sampling = _with(sampling, banned=tuple(dict.fromkeys(_banned(ask.bad_words, tokenizer))))
    if (constraints := sampling.constraints) is not None:
        named = {
            "logit_bias": (token for token, _ in constraints.logit_bias),
            "allowed_token_ids": constraints.allowed or (),
            "stop_token_ids": constraints.stop_token_ids,
        }
        for param, ids in named.items():
            if any(token >= tokenizer.n_vocab for token in ids):
                refuse(param, f"expected token ids from 0 to {tokenizer.n_vocab - 1}")
        if problem := sampling.problem():
            refuse(*problem)
    ends = frozenset[int]() if ask.ignore_eos else tokenizer.eos
    if ask.min_tokens and (ends or sampling.stops):
        sampling = msgspec.structs.replace(sampling, min_tokens=ask.min_tokens).ending(ends)
    return sampling


def _banned(words: tuple[str, ...], tokenizer: Tokenizer) -> Iterator[tuple[int, ...]]:
    """Each word as it is at the beginning of a text and, as vLLM has it, after a space."""
    for word in words:
        for prefix in ("", " "):
            ids = tokenizer.encode(prefix + word.lstrip(), add_bos=False, parse_special=False)
            if ids:
                yield tuple(ids)


def fill_in(prefix: str, suffix: str, target: Target, check: Check) -> list[int]:
    """A prompt for what comes between two texts. Raises RequestError 400 where the model has no tokens for that."""
    tokenizer = target.tokenizer
    marks = next((fim for fim in _FIM if all(m in tokenizer.controls for m in fim)), None)
    if marks is None:
        refuse(
            "suffix", "not supported: this model has no tokens to fill in the middle", "unsupported_parameter"
        )
    if (fewest := tokenizer.fewest(prefix) + tokenizer.fewest(suffix)) >= target.context:
        raise too_long(target.context, fewest, "prompt")
    before, after, middle = (
        tokenizer.encode(m, add_bos=i == 0, parse_special=True) for i, m in enumerate(marks)
    )
    texts = [tokenizer.encode(t, add_bos=False, parse_special=False, check=check) for t in (prefix, suffix)]
    return [*before, *texts[0], *after, *texts[1], *middle]
