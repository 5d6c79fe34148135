"""A verifier whose target says sensible things: a toy engine with a script, behind everything that is real.

    python -m tests.clients.scripted PORT

What it says depends on the prompt's text, and on the grammar where there is one. Tokens are bytes. Constraints hold as
for any engine: where the script says what they forbid, something else is said.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import Sequence

from wisp.api.keys import Keyring
from wisp.api.process import Listen, event_loop_factory, run_app
from wisp.core.protocol.constraints import Constraints
from wisp.core.protocol.step import Copy, Slice, SliceResult, TokenLogprob, TopLogprob
from wisp.engines.base import EngineInfo, StepQueue, TargetEngine, Tokenizer
from wisp.engines.constraining import SlotTrackers, agreeing
from wisp.engines.grammars import Grammars
from wisp.engines.identity import engine_digest
from wisp.engines.in_order import OneAtATime
from wisp.engines.null import EOS, N_VOCAB
from wisp.engines.plain import PlainTokenizer
from wisp.server.app import ServerApp, Settings

MODEL = "scripted"
CONTEXT = 1 << 16
SLOTS = 32

# What a call of a function of this name has as its arguments
ARGUMENTS = {
    "get_weather": {"city": "Paris"},
    "final_answer": {"answer": "It is sunny in Paris."},
}
PERSON = {"name": "Ada", "age": 36}
TOLD = "It is sunny in Paris."
HELLO = "Hello! How can I help you?"
_CALLED = re.compile(r'\\"name\\": \\"(\w+)\\"')


def script(prompt: str, constraints: Constraints | None) -> str:
    """What to say."""
    grammar = constraints.grammar if constraints is not None else None
    answered = "<|im_start|>tool" in prompt or "Observation" in prompt
    # strict tools: text is free
    if grammar is not None and re.search(r"\nstart: (text|TEXT) calls\?", grammar.source):
        grammar = None
    if grammar is not None and "\nstart: calls" in grammar.source:
        names = _CALLED.findall(grammar.source)
        final = "final_answer" in names and answered
        name = "final_answer" if final else next(n for n in names if n != "final_answer")
        return call(name)
    if grammar is not None:
        return json.dumps(PERSON)
    if "weather" in prompt.lower():
        return TOLD if answered else call("get_weather")
    return HELLO


def call(name: str) -> str:
    """A call as Hermes has it."""
    body = {"name": name, "arguments": ARGUMENTS.get(name, PERSON)}
    return f"<tool_call>\n{json.dumps(body)}\n</tool_call>"


class ScriptedTarget:
    """TargetEngine that follows `script`."""

    def __init__(self) -> None:
        digest = engine_digest("scripted")
        eos = frozenset({EOS})
        self.info = EngineInfo(
            "scripted", MODEL, "exact", N_VOCAB, eos, SLOTS, CONTEXT, SLOTS * CONTEXT, 1 << 20, digest
        )
        self.constraints = SlotTrackers()
        self._held: list[list[int]] = [[] for _ in range(SLOTS)]

    def queue(self, depth: int) -> StepQueue:
        """Steps run one at a time."""
        return OneAtATime(self, depth)

    def run(self, batch: Sequence[Slice]) -> list[SliceResult]:
        """Say what comes next."""
        return [self._run(s) for s in batch]

    def _run(self, s: Slice) -> SliceResult:
        held = self._held[s.slot]
        held[s.start :] = s.tokens
        if not s.sample:
            return SliceResult(s.session)
        first = len(held) - s.n_draft
        prompt = bytes(t for t in held[: first - s.position] if t < 256).decode("utf-8", "replace")
        said = script(prompt, s.sampling.constraints).encode()

        def text(seed: int, position: int) -> int:
            return said[position] if position < len(said) else EOS

        result = agreeing(s, text, s.sampling.seed, self.constraints, N_VOCAB)
        del held[first + result.accepted :]
        if s.logprobs is None or result.error:
            return result
        logprobs = [
            TokenLogprob(t, _logprob(t), [TopLogprob(t, _logprob(t))][: s.logprobs]) for t in result.tokens
        ]
        return SliceResult(s.session, result.accepted, result.tokens, logprobs)

    def copy(self, copy: Copy) -> None:
        """Copy what a slot holds."""
        self._held[copy.target] = self._held[copy.source][: copy.tokens]

    def close(self) -> None:
        """There is nothing to free."""


def _logprob(token: int) -> float:
    """As if letters came by their place in the alphabet."""
    return -0.01 * (token % 32 + 1)


def load() -> tuple[TargetEngine, Tokenizer]:
    """The engine and its tokenizer."""
    tokenizer, target = PlainTokenizer(), ScriptedTarget()
    target.constraints.grammars = Grammars(tokenizer)
    return target, tokenizer


def main() -> None:
    """Serve until SIGTERM."""
    cloud = ServerApp(Settings(MODEL), Keyring(None, None), load)

    async def run() -> None:
        await run_app(cloud.asgi, Listen(port=int(sys.argv[1])), cloud.drain, cloud.ended, keyed=False)

    with asyncio.Runner(loop_factory=event_loop_factory()) as runner:
        runner.run(run())


if __name__ == "__main__":
    main()
