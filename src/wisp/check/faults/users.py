"""Users: each asks for one text, of an edge or as a thin client, reads it, and looks at every token."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from wisp.api.backend import Backend, Generation
from wisp.api.extras import Extras
from wisp.check.faults.engine import EOS, N_VOCAB, Text
from wisp.check.faults.loop import Life
from wisp.check.faults.oracles import AskWatch
from wisp.core.errors import RequestError
from wisp.core.protocol.constraints import Constraints
from wisp.core.protocol.sampling import Sampling
from wisp.core.protocol.slo import Slo

if TYPE_CHECKING:
    from wisp.check.faults.world import World

SALTS = ("", "", "red", "blue")  # of an edge's customers
SLOS = (None, None, Slo(2000.0, 1000.0), Slo(400.0, 60.0), Slo(0.0, 30.0))


def some_tokens(rng: random.Random, n: int) -> list[int]:
    """So many ids."""
    return [rng.randrange(N_VOCAB) for _ in range(n)]


def some_sampling(rng: random.Random) -> Sampling:
    """Seeded, now and then with constraints."""
    constraints = None
    if rng.random() < 0.12:
        constraints = rng.choice(
            (
                Constraints(banned=((rng.randrange(EOS),), (rng.randrange(EOS), rng.randrange(EOS)))),
                Constraints(frequency_penalty=0.6),
                Constraints(stop_token_ids=tuple(some_tokens(rng, 4))),
                Constraints(logit_bias=((rng.randrange(EOS), 50.0),)),
                Constraints(repetition_penalty=1.2),
            )
        )
    return Sampling(
        temperature=rng.choice((0.0, 0.7)),
        seed=rng.getrandbits(40),
        min_tokens=rng.choice((0, 0, 0, 8)),
        constraints=constraints,
    )


def some_prompt(rng: random.Random, most: int) -> list[int]:
    """Many begin as others do: a system message, of which there are three."""
    head = some_tokens(random.Random(f"system {rng.randrange(3)}"), 40) if rng.random() < 0.6 else []
    return (head + some_tokens(rng, rng.randint(1, 24)))[:most]


class Ask:
    """One request. It is over when its task is, or its process."""

    def __init__(self, world: World, life: Life, name: str, number: int, former: list[int]) -> None:
        self.world, self.life, self.name = world, life, name
        rng = random.Random(f"ask {number}")
        context = world.shape.slot_tokens
        self.prompt = former or some_prompt(rng, context - 8)
        self.sampling = some_sampling(rng)
        self.max_tokens = rng.randint(1, max(1, min(56, context - len(self.prompt))))
        self.ignore_eos = rng.random() < 0.1
        self.logprobs = rng.choice((0, 2)) if rng.random() < 0.2 else None
        self.slo = rng.choice(SLOS)
        self.salt = rng.choice(SALTS)
        self.extras = Extras(rounds=rng.random() < 0.3, draft=rng.random() > 0.1)
        self.enough = rng.randint(1, 30) if rng.random() < 0.15 else 1 << 30  # tokens: a stop string
        self.again = rng.random() < 0.35
        self.halted = 0.0  # until then, nothing is read
        self.watch: AskWatch | None = None
        self.outcome = ""
        self.task: asyncio.Task[None] | None = None

    @property
    def over(self) -> bool:
        return self.outcome != "" or not self.life.alive

    def start(
        self, key: str, connected: Callable[[], Awaitable[str]], backend: Callable[[], Backend]
    ) -> None:
        """`connected` waits for a server and returns its digest."""
        self.task = self.world.loop.spawn(self.life, self._run(key, connected, backend))

    async def _run(
        self, key: str, connected: Callable[[], Awaitable[str]], backend: Callable[[], Backend]
    ) -> None:
        watch = self.watch = AskWatch(self.world, self.name)
        try:
            digest = await connected()
            watch.text = Text(
                self.world.salts[digest],
                self.prompt,
                self.sampling,
                self.max_tokens,
                ignore_eos=self.ignore_eos,
            )
            await self._read(key, digest, backend(), watch)
            self.outcome = watch.finish or "enough"
        except RequestError as error:
            self.outcome = error.code
            watch.failed(error)
        except asyncio.CancelledError:
            self.outcome = "left"
            raise
        finally:
            self.outcome = self.outcome or "lost"
            self.world.asked(self)

    async def _read(self, key: str, digest: str, backend: Backend, watch: AskWatch) -> None:
        backend.admit(key)
        stream = backend.generate(
            Generation(
                self.prompt,
                self.sampling,
                self.max_tokens,
                self.ignore_eos,
                self.logprobs,
                self.slo,
                self.salt,
                digest,
                key=key,
                extras=self.extras,
            )
        )
        try:
            async for committed in stream:
                watch.told(committed)
                if watch.given >= self.enough:
                    return
                while self.world.loop.now < self.halted:
                    await asyncio.sleep(self.halted - self.world.loop.now)
        finally:
            await stream.aclose()  # type: ignore[attr-defined]
        if not watch.finish:
            raise self.world.violated(f"{self.name}: the stream ended before the text")
