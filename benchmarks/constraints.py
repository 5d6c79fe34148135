"""`make bench-constraints`: what constraints cost, and what drafting gains from them.

*masks*     those along a draft of 5 tokens, at each place of answers that the schemas below allow, with the vocabulary
            of the pair's target. A matcher goes from place to place as in a session.
*plain*     requests without constraints, by this version and by the last one before there were any, in turn
            (`benchmarks.constraints_before`).
*drafts*    the pair answers under each schema, greedily, drafting four tokens a round: with the grammar on the edge,
            and without. Which tokens cost the drafter nothing, and how many drafts are accepted?

Times are CPU time, so that a busy machine makes them longer, but not by what it does meanwhile.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from benchmarks.constraints_before import Plain, plain
from wisp.api.template import chat_template
from wisp.core.errors import ConfigError
from wisp.core.protocol.constraints import Constraints, Grammar
from wisp.core.protocol.sampling import Sampling
from wisp.core.protocol.step import Slice
from wisp.engines.base import TargetEngine, Tokenizer
from wisp.engines.build import load_target
from wisp.engines.constrained_draft import ConstrainedDraft
from wisp.engines.grammars import Grammars
from wisp.engines.llama.draft import LlamaDraft
from wisp.engines.models import PAIRS, resolve

AIM_MASKS_MS, AIM_PLAIN, AIM_FORCED = 1.0, 0.02, 0.25
DRAFT = 5  # tokens of a draft whose masks are timed
ROUND = 4  # tokens drafted in a round, certain ones besides
LONGEST = 160  # tokens of an answer


class Asked(msgspec.Struct, frozen=True):
    """A request under a schema, and an answer that the schema allows."""

    ask: str
    schema: dict[str, object]
    answer: object


def _object(**properties: object) -> dict[str, object]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


STRING, INTEGER, NUMBER, BOOLEAN = ({"type": t} for t in ("string", "integer", "number", "boolean"))
ASKED = (
    Asked(
        "Describe a person named Mira, who is 31, as JSON.",
        _object(name=STRING, age=INTEGER, email=STRING, active=BOOLEAN),
        {"name": "Mira", "age": 31, "email": "mira@example.org", "active": True},
    ),
    Asked(
        "Call the weather tool for Lisbon, in celsius, for the next 3 days.",
        _object(
            name={"const": "get_weather"},
            arguments=_object(location=STRING, unit={"enum": ["celsius", "fahrenheit"]}, days=INTEGER),
        ),
        {"name": "get_weather", "arguments": {"location": "Lisbon", "unit": "celsius", "days": 3}},
    ),
    Asked(
        "Extract the order: two lamps at 12.50 each and one kettle at 30, to be sent to Bergen.",
        _object(
            items={
                "type": "array",
                "items": _object(title=STRING, quantity=INTEGER, price=NUMBER),
                "maxItems": 3,
            },
            destination=_object(city=STRING, country=STRING),
            currency={"enum": ["EUR", "NOK", "USD"]},
        ),
        {
            "items": [
                {"title": "lamp", "quantity": 2, "price": 12.5},
                {"title": "kettle", "quantity": 1, "price": 30},
            ],
            "destination": {"city": "Bergen", "country": "Norway"},
            "currency": "NOK",
        },
    ),
    Asked(
        "Classify this review: 'The lamp broke after a day, but support was kind.'",
        _object(
            sentiment={"enum": ["positive", "negative", "mixed"]},
            confidence={"type": "number", "minimum": 0, "maximum": 1},
            topics={
                "type": "array",
                "items": {"enum": ["quality", "price", "support", "delivery"]},
                "maxItems": 3,
            },
        ),
        {"sentiment": "mixed", "confidence": 0.8, "topics": ["quality", "support"]},
    ),
)


class Timing(msgspec.Struct):
    """CPU milliseconds."""

    median: float
    p99: float
    n: int


class Drafted(msgspec.Struct):
    """Of answers: tokens, those of them that cost the drafter nothing, its steps per token, accepted draft tokens."""

    tokens: int
    forced: float
    steps_per_token: float
    acceptance: float


class Report(msgspec.Struct):
    """All of it. `masks_ms`: along a draft of 5. `plain`: by what is done; see `benchmarks.constraints_before`."""

    command: str
    date: str
    machine: str
    pair: str
    n_vocab: int
    compile_ms: float
    masks_ms: Timing
    with_grammar: Drafted
    without: Drafted
    before: str
    plain: dict[str, Plain]


def run_bench(pair: str, before: str, *, out: Path | None, as_json: bool, offline: bool) -> None:
    """Measure, print, and write the figures to `out`. before: a version in git."""
    if pair not in PAIRS:
        raise ConfigError(f"there is no pair {pair!r}; take one of {', '.join(PAIRS)}")
    costs = plain(before)  # first, as it may find out that it cannot be done
    target, draft = PAIRS[pair]
    engine, tokenizer = load_target(target, slots=1, context=1024, offline=offline)
    drafter = LlamaDraft(resolve(draft, offline=offline), slots=1, slot_tokens=1024)
    try:
        compile_ms, masks = masks_of(tokenizer)
        report = Report(
            f"python -m benchmarks constraints --pair {pair} --before {before}",
            datetime.date.today().isoformat(),
            f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, "
            f"load {os.getloadavg()[0]:.0f} at the end",
            pair,
            tokenizer.n_vocab,
            compile_ms,
            masks,
            _drafted(engine, drafter, tokenizer, with_grammar=True),
            _drafted(engine, drafter, tokenizer, with_grammar=False),
            before,
            costs,
        )
    finally:
        drafter.close()
        engine.close()
    data = msgspec.json.format(msgspec.json.encode(report)).decode()
    if out is not None:
        out.write_text(data + "\n")
    if as_json:
        print(data)
    else:
        _show(report)


# --- masks


def masks_of(tokenizer: Tokenizer) -> tuple[float, Timing]:
    """(median milliseconds to compile a schema here, once it was tried, time of the masks along a draft)."""
    grammars = Grammars(tokenizer)
    grammars.compile(Grammar("json_object"))  # makes the vocabulary's own form
    compiling, times = [], []
    for asked in ASKED:
        grammar = _grammar(asked)
        compiling.append(_cpu_ms(lambda g=grammar: grammars.compile(g)))  # type: ignore[misc]
        text = tokenizer.encode(json.dumps(asked.answer), add_bos=False, parse_special=False)
        matcher = grammars.matcher(grammar)
        for i in range(len(text)):
            before, draft = text[:i], text[i : i + DRAFT]
            times.append(_cpu_ms(lambda b=before, d=draft, m=matcher: m.masks(b, d)))  # type: ignore[misc]
    times.sort()
    return statistics.median(compiling), Timing(
        statistics.median(times), times[len(times) * 99 // 100], len(times)
    )


def _grammar(asked: Asked) -> Grammar:
    return Grammar("json_schema", json.dumps(asked.schema))


def _cpu_ms(work: Callable[[], object]) -> float:
    started = time.thread_time()
    work()
    return (time.thread_time() - started) * 1e3


# --- drafts


def _drafted(
    engine: TargetEngine, drafter: LlamaDraft, tokenizer: Tokenizer, *, with_grammar: bool
) -> Drafted:
    edge = ConstrainedDraft(drafter)
    edge.matchers = engine.constraints.grammars if with_grammar else None
    tokens = forced = drafted = accepted = steps = 0
    for number, asked in enumerate(ASKED):
        engine.constraints.grammars.compile(_grammar(asked))
        sampling = Sampling(constraints=Constraints(grammar=_grammar(asked)))
        prompt, text, held = _prompt(tokenizer, asked.ask), list[int](), 0
        while len(text) < LONGEST and not (text and text[-1] in tokenizer.eos):
            guess, free = _round(edge, f"{with_grammar}/{number}", [*prompt, *text], len(text), sampling)
            guess = _cut(guess, tokenizer.eos)
            chain = [*prompt, *text]
            work = Slice(1, 0, held, chain[held:] + guess, len(guess), True, len(text), sampling, None, text)
            [result] = engine.run([work])
            if result.error:
                raise ConfigError(result.error)
            held = len(chain) + result.accepted
            steps += sum(not f for f in free)
            drafted += len(guess)
            accepted += result.accepted
            forced += sum(free[: result.accepted])
            text += _cut(result.tokens, tokenizer.eos)
        tokens += len(text)
        edge.forget(f"{with_grammar}/{number}")
    return Drafted(tokens, forced / tokens, steps / tokens, accepted / max(1, drafted))


def _round(
    edge: ConstrainedDraft, name: str, context: list[int], position: int, sampling: Sampling
) -> tuple[list[int], list[bool]]:
    """A draft, and which of its tokens cost nothing."""
    guess: list[int] = []
    free: list[bool] = []
    while len(guess) < ROUND:
        proposal = edge.propose(name, [*context, *guess], position + len(guess), sampling)
        if proposal is None:
            break
        guess += [proposal.token, *proposal.then]
        free += [proposal.signal.certain, *(True for _ in proposal.then)]
    return guess, free


def _cut(tokens: Sequence[int], ends: frozenset[int]) -> list[int]:
    stop = next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))
    return list(tokens[:stop])


def _prompt(tokenizer: Tokenizer, ask: str) -> list[int]:
    text = chat_template(tokenizer.chat_template).render(
        [{"role": "user", "content": ask}], bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token
    )
    return tokenizer.encode(text, add_bos=False, parse_special=True)


def _show(report: Report) -> None:
    table = Table(title=f"Constraints: {report.pair}, {report.n_vocab} ids", show_header=False)
    masks = report.masks_ms
    table.add_row("compiling a schema", f"{report.compile_ms:.1f} ms")
    table.add_row(
        f"masks along a draft of {DRAFT}", f"{masks.median:.2f} ms, p99 {masks.p99:.2f}; aim {AIM_MASKS_MS:g}"
    )
    for name, d in (("with the grammar on the edge", report.with_grammar), ("without", report.without)):
        table.add_row(
            name,
            f"{d.forced:.0%} of {d.tokens} tokens without the drafter, {d.steps_per_token:.2f} of its steps a token, "
            f"{d.acceptance:.0%} accepted",
        )
    table.add_row("aim", f"{AIM_FORCED:.0%} without the drafter, and no fewer accepted")
    for what, p in report.plain.items():
        change = f"{p.more:+.1%} ({p.low:+.1%} to {p.high:+.1%})"
        table.add_row(f"without constraints: {what}", f"{p.before:.3f} ms before, {p.now:.3f} now: {change}")
    table.add_row("aim", f"at most {AIM_PLAIN:+.0%}")
    Console().print(table)
