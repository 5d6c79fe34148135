"""`wisp generate`: one generation from the shell, by the same path as the edge's endpoint."""

from __future__ import annotations

import codecs
import json
import secrets
import sys
import time

import msgspec

from wisp.api.backend import Committed, Generation, Target
from wisp.api.messages import Message
from wisp.api.prepare import prepare
from wisp.api.requests import GenerationRequest
from wisp.core.draft.policies import Ahead, Policies
from wisp.core.draft.stats import SpecStats
from wisp.core.errors import ConfigError
from wisp.core.protocol.sampling import Sampling
from wisp.edge.backend import EdgeBackend
from wisp.edge.link import VerifierLink
from wisp.edge.tokenizers import TokenizerCache
from wisp.engines.base import DraftEngine, Tokenizer


class Request(msgspec.Struct, frozen=True):
    """The user's request."""

    prompt: str
    system: str | None
    raw: bool
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int | None
    max_tokens: int


class Answer(msgspec.Struct):
    """The answer. `first` and `last` are the times of its tokens, in seconds since the request."""

    tokens: list[int] = []
    from_draft: list[bool] = []
    finish: str = ""
    first: float = 0.0
    last: float = 0.0
    stats: SpecStats = msgspec.field(default_factory=SpecStats)

    def add(self, item: Committed, at: float) -> None:
        if item.tokens:
            self.first = self.first or at
            self.last = at
        self.tokens += item.tokens
        self.from_draft += [i < item.from_draft for i in range(len(item.tokens))]
        self.finish = item.finish
        self.stats.round(item.drafted, item.accepted)

    @property
    def tokens_per_second(self) -> float:
        """Token speed: tokens after the first, over the time from the first to the last."""
        return (len(self.tokens) - 1) / (self.last - self.first) if self.last > self.first else 0.0


async def generate_once(
    request: Request,
    server: str,
    api_key: str | None,
    drafter: DraftEngine | None,
    fingerprint: str,
    policies: Policies,
    ahead: Ahead | None,
    *,
    as_json: bool,
) -> None:
    """Generate and print. Raises WispError."""
    link = VerifierLink(server, api_key, fingerprint=fingerprint)
    backend = EdgeBackend(link, TokenizerCache(server, api_key), drafter, policies, ahead)
    link.start()
    try:
        target = await backend.target()
        generation = _generation(request, target)
        printer = _Printer(target.tokenizer) if not as_json else None
        answer = Answer()
        started = time.monotonic()
        async for item in backend.generate(generation):
            answer.add(item, time.monotonic() - started)
            if printer is not None:
                printer.show(item)
    finally:
        await link.close()
        backend.close()
    report = _report(generation, target, answer)
    if as_json:
        print(json.dumps(report, ensure_ascii=False))
    elif printer is not None:
        printer.summary(report)


def _generation(request: Request, target: Target) -> Generation:
    seed = request.seed if request.seed is not None else secrets.randbits(63)
    sampling = Sampling(request.temperature, request.top_k, request.top_p, request.min_p, seed)
    if problem := sampling.problem():
        raise ConfigError(f"--{problem[0].replace('_', '-')} {problem[1]}")
    messages: list[Message] = [{"role": "system", "content": request.system}] if request.system else []
    messages.append({"role": "user", "content": request.prompt})
    ask = GenerationRequest(
        chat=not request.raw,
        model=target.model,
        sampling=sampling,
        prompts=(request.prompt,),
        messages=messages,
        max_tokens=request.max_tokens,
    )
    return prepare(ask, target).generations[0]


def _report(generation: Generation, target: Target, answer: Answer) -> dict[str, object]:
    pieces = b"".join(target.tokenizer.piece(t) for t in answer.tokens)
    return {
        "model": target.model,
        "text": pieces.decode("utf-8", "replace"),
        "tokens": answer.tokens,
        "finish_reason": answer.finish,
        "seed": generation.sampling.seed,
        "usage": {"prompt_tokens": len(generation.prompt), "completion_tokens": len(answer.tokens)},
        "ttft_ms": round(answer.first * 1e3, 3),
        "tokens_per_second": round(answer.tokens_per_second, 3),
        "metrics": {"speculative_decoding": answer.stats.report()},
    }


class _Printer:
    """Streams text, coloured by origin."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.colour = sys.stdout.isatty()
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def show(self, item: Committed) -> None:
        for i, token in enumerate(item.tokens):
            text = self.decoder.decode(self.tokenizer.piece(token))
            # Written as it is: a console would expand tabs and drop control characters.
            green = self.colour and i < item.from_draft and text
            sys.stdout.write(f"\x1b[32m{text}\x1b[0m" if green else text)
        sys.stdout.flush()

    def summary(self, report: dict[str, object]) -> None:
        usage, metrics = report["usage"], report["metrics"]
        assert isinstance(usage, dict)
        assert isinstance(metrics, dict)
        spec = metrics["speculative_decoding"]
        print(self.decoder.decode(b"", final=True))
        print(
            f"[{report['model']}: {usage['completion_tokens']} tokens, {report['finish_reason']}, "
            f"first after {report['ttft_ms']:.0f} ms, {report['tokens_per_second']:.1f} tokens/s, "
            f"acceptance length {spec['mean_acceptance_length']:.2f}, seed {report['seed']}]",
            file=sys.stderr,
        )
