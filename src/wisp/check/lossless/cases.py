"""The cases: prompts x samplings x drafters x batching policies, and constraints x drafters, with ends of every kind in
the middle of text."""

from __future__ import annotations

import itertools
import random
from collections import defaultdict
from collections.abc import Sequence

import msgspec

from wisp.api.template import chat_template
from wisp.check.lossless.constraints import MAKERS, constrain
from wisp.check.lossless.drafts import DRAFTERS
from wisp.check.lossless.judge import Case, Judge, Reference
from wisp.check.lossless.world import Chaos
from wisp.core.protocol.sampling import Sampling
from wisp.core.protocol.slo import Slo
from wisp.engines.base import Tokenizer

EVERY, CONSTRAINED = 7, 3  # so many of every so many cases have constraints
BATCHING = ("wisp", "continuous", "fcfs")
# No SLO; a slow one, whose sessions are soon far ahead and may be preempted; one that is too fast for the edges.
SLOS = (None, Slo(ttft_ms=2000.0, tpot_ms=1000.0), Slo(ttft_ms=300.0, tpot_ms=40.0))
SYSTEM = "You are a helpful assistant. You answer in short sentences, and you never make things up."
ASKS = (
    "Write a function that counts the lamps.",
    "Tell me a story about Mira.",
    "How do I get from the river to the market?",
    "Hello! ✓",
    "Write about a fox and a lamp.",
    "Hi",
    "Can you explain bread to an owl? Then say it again, word for word.",
    "Who is Zidavu?",
)
PLAIN = (
    "def add_lamp(total, count):\n",
    "Day 1: Anna painted a red kite.\nDay 2: Anna painted a blue kite.\nDay 3:",
    "12 + 7 = 19\n13 + 7 = 20\n14 + 7 =",
    "At noon Søren ate crème with the mouse 🙂.",
)
GREEDY, NUCLEUS, PLAIN_SAMPLING = (0.0, 1.0), (0.7, 0.9), (1.0, 1.0)


class Scale(msgspec.Struct, frozen=True):
    """How much is checked. Tokens, except where a unit is given.

    kinds: (temperature, top_p); seeds: for each that samples; length: of reference texts; shortest, longest:
    max_tokens; slots: of each verifier; turns: part of the cases that continue an earlier one;
    samples: sessions of each statistical test; strict: everything that was promised to happen must happen
    """

    cases: int
    chats: int
    plain: int
    kinds: tuple[tuple[float, float], ...]
    seeds: int
    length: int
    shortest: int
    longest: int
    slots: int
    slot_tokens: int
    at_once: int
    threads: int | None
    chaos: Chaos
    turns: float = 0.0
    samples: int = 0
    strict: bool = False


TINY = Scale(
    cases=560,
    chats=8,
    plain=4,
    kinds=(GREEDY, NUCLEUS, PLAIN_SAMPLING),
    seeds=3,
    length=80,
    shortest=20,
    longest=72,
    slots=4,
    slot_tokens=384,
    at_once=12,
    threads=1,  # more would spend their time waiting for each other
    chaos=Chaos(
        lose=0.02,
        restart=0.002,
        fail=0.002,
        slow=0.01,
        cancel=0.01,
        silence=0.004,
        move=0.6,
        meddle=0.15,
        overlong=0.3,
    ),
    turns=0.2,
    samples=2000,
    strict=True,
)
REAL = Scale(
    cases=12,
    chats=2,
    plain=1,
    kinds=(GREEDY, NUCLEUS),
    seeds=1,
    length=68,
    shortest=64,
    longest=64,
    slots=3,
    slot_tokens=256,
    at_once=5,
    threads=None,
    chaos=Chaos(lose=0.01, restart=0.001, cancel=0.003, silence=0.004, move=0.3, meddle=0.08, overlong=0.3),
)


def prompts(tokenizer: Tokenizer, chats: int, plain: int) -> list[list[int]]:
    """Prompts as ids. Chats share their head, and every other one a system message too."""
    template = chat_template(tokenizer.chat_template)
    texts = []
    for i, ask in enumerate(ASKS[:chats]):
        messages = [{"role": "system", "content": SYSTEM}] if i % 2 == 0 else []
        messages.append({"role": "user", "content": ask})
        texts.append(template.render(messages, bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token))
    ids = [tokenizer.encode(t, add_bos=False, parse_special=True) for t in texts]
    return ids + [tokenizer.encode(t, add_bos=True, parse_special=False) for t in PLAIN[:plain]]


def stand_in_for_eos(reference: Reference, some: Sequence[list[int]]) -> frozenset[int]:
    """An ordinary token to end sequences too, as a small model seldom ends one by itself.

    It is the one that first comes up in the middle of texts most often, but never in more than half of them.
    """
    first: dict[int, list[int]] = defaultdict(list)  # token -> where each text has it first
    texts = [
        reference.tokens(prompt, Sampling(temperature), ignore_eos=True)
        for prompt in some
        for temperature in (0.0, 1.0)
    ]
    for text in texts:
        for token in set(text):
            first[token].append(text.index(token))
    usable = {t: at for t, at in first.items() if len(at) <= len(texts) // 2 and min(at) >= 4}
    best = max(usable, key=lambda t: (sum(12 <= a < 60 for a in usable[t]), -t), default=None)
    return frozenset() if best is None else frozenset({best})


class CaseMaker:
    """Deals out cases. Every drafter meets every batching policy and every kind of sampling, and every constraint, in
    turn."""

    def __init__(self, tokenizer: Tokenizer, judge: Judge, scale: Scale, seed: int) -> None:
        self.rng = random.Random(seed)
        self.tokenizer, self.judge, self.scale = tokenizer, judge, scale
        self.prompts = prompts(tokenizer, scale.chats, scale.plain)
        next_turn = chat_template(tokenizer.chat_template).render(
            [{"role": "user", "content": "Go on."}],
            bos_token=tokenizer.bos_token,
            eos_token=tokenizer.eos_token,
        )
        self.next_turn = tokenizer.encode(next_turn, add_bos=False, parse_special=True)
        cells = list(itertools.product(DRAFTERS, BATCHING, scale.kinds))
        constrained = list(itertools.product(DRAFTERS, MAKERS))
        self.rng.shuffle(cells)
        self.rng.shuffle(constrained)
        self.cells, self.constrained = itertools.cycle(cells), itertools.cycle(constrained)
        self.order = itertools.cycle(self.rng.sample(self.prompts, len(self.prompts)))
        self.made: list[Case] = []

    def make(self) -> Case:
        """The next case; computes its reference if it is a new one."""
        rng, scale = self.rng, self.scale
        constraint = ""
        if len(self.made) % EVERY < CONSTRAINED:
            (drafter, drafting), constraint = next(self.constrained)
            batching, (temperature, top_p) = rng.choice(BATCHING), rng.choice(scale.kinds)
        else:
            (drafter, drafting), batching, (temperature, top_p) = next(self.cells)
        before = self._former(batching) if rng.random() < scale.turns else None
        prompt = self._continued(before) if before is not None else next(self.order)
        seed = rng.randrange(scale.seeds) if temperature else 0
        sampling = Sampling(temperature, top_p=top_p, seed=seed)
        ignore_eos = before is None and scale.strict and rng.random() < 0.05
        script = self.judge.reference.tokens(prompt, sampling, ignore_eos=ignore_eos)
        if constraint:
            sampling = constrain(constraint, sampling, script, rng)
            self.judge.reference.prepare(sampling)
            if sampling.min_tokens and not ignore_eos:
                sampling = sampling.ending(self.judge.reference.eos)
            script = self.judge.reference.tokens(prompt, sampling, ignore_eos=ignore_eos)
        case = Case(
            number=len(self.made),
            prompt=prompt,
            sampling=sampling,
            max_tokens=self._max_tokens(len(script)),
            script=script,
            constraint=constraint,
            drafter=drafter,
            drafting=drafting,
            batching=batching,
            ignore_eos=ignore_eos,
            logprobs=rng.choice((0, 2)) if rng.random() < 0.1 else None,
            after=before.number if before is not None else -1,
            slo=rng.choice(SLOS),
        )
        if rng.random() < 0.25:
            case = msgspec.structs.replace(case, stop=self._stop(case))
        self.made.append(case)
        return case

    def _max_tokens(self, known: int) -> int:
        """Anything from short to long; where the reference ends by itself, often enough to see that."""
        if known < self.scale.length and self.scale.strict and self.rng.random() < 0.8:
            return self.scale.length
        if self.scale.strict and self.rng.random() < 0.05:
            return self.rng.randint(1, 3)
        return self.rng.randint(self.scale.shortest, self.scale.longest)

    def _former(self, batching: str) -> Case | None:
        room = self.scale.slot_tokens - self.scale.length - len(self.next_turn) - 1
        recent = [
            c
            for c in self.made[-24:]
            if c.batching == batching and not c.stop and len(c.prompt) + c.max_tokens < room
        ]
        return self.rng.choice(recent) if recent else None

    def _continued(self, case: Case) -> list[int]:
        return case.prompt + self.judge.expected(case).tokens + self.next_turn

    def _stop(self, case: Case) -> tuple[str, ...]:
        """A few characters out of the middle of the expected text, wherever tokens begin and end."""
        text = self.judge.expected(case).text
        if len(text) < 16:
            return ()
        at = self.rng.randrange(len(text) // 4, len(text) - 6)
        stop = text[at : at + self.rng.randint(2, 6)]
        return () if "�" in stop else (stop, "this never comes up")
