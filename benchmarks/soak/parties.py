"""The users of a soak: customers of router and edge over HTTP, and emulated devices. They check every token."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from typing import Any

import msgspec
from websockets.asyncio.client import ClientConnection

from benchmarks.soak.http import Line, Said
from benchmarks.soak.stack import PATIENCE_S, Door, Stack, a_key
from benchmarks.soak.texts import HashDraft, Job, Jobs, flaw
from wisp.api.backend import Generation
from wisp.core.draft.policies import Ahead, Policies
from wisp.core.errors import WispError
from wisp.core.protocol.sampling import Sampling
from wisp.edge.backend import EdgeBackend
from wisp.edge.link import VerifierLink
from wisp.edge.tokenizers import TokenizerCache

LEAVE = 0.04  # of customers, in mid-answer
CUT = 0.02  # of devices' sessions: then all of the device's connections break
TOKENS = (8, 16)  # of an answer
AGAIN_S = (0.05, 0.3)  # after a connection that ended, or a refusal
HEAD_S = 10.0  # within which a new connection must have sent a request
MOST_FINDINGS = 40


class Tally(msgspec.Struct):
    """What a phase did, and what came of it. Sessions are those that ended, with their text or since their user left.

    cut: answers that ended with their process, and were asked for again. refused: likewise, by status and code.
    lost, doubled, wrong: texts that lack something, say it twice, or say something else; lost ones include answers that
    never came. findings: what else must not be, in words.
    """

    sessions: Counter[str] = msgspec.field(default_factory=Counter)
    tokens: int = 0
    left: int = 0
    cut: int = 0
    reconnects: int = 0
    refused: Counter[str] = msgspec.field(default_factory=Counter)
    faults: Counter[str] = msgspec.field(default_factory=Counter)
    lost: int = 0
    doubled: int = 0
    wrong: int = 0
    findings: list[str] = msgspec.field(default_factory=list)

    @property
    def done(self) -> int:
        return sum(self.sessions.values())

    def find(self, what: str) -> None:
        if len(self.findings) < MOST_FINDINGS:
            self.findings.append(what)

    def judge(self, job: Job, said: str | tuple[int, ...], *, whole: bool, who: str) -> None:
        """Compare what was said with what must be."""
        truth = job.text if isinstance(said, str) else job.tokens
        if kind := flaw(said, truth, whole=whole):
            setattr(self, kind, getattr(self, kind) + 1)
            self.find(f"{who}: {kind}: {said!r} instead of {truth!r}")


class Work:
    """Sessions that are yet to begin. While `held` there are more of them than were meant: faults need company."""

    def __init__(self, count: int, jobs: Jobs, tally: Tally, until: float = float("inf")) -> None:
        self.tally = tally
        self.held = False
        self._left = count
        self._jobs = jobs
        self._until = until

    @property
    def over(self) -> bool:
        return self._left <= 0 or time.monotonic() > self._until

    def next(self, chance: random.Random) -> Job | None:
        if self.over and not self.held:
            return None
        self._left -= 1
        return self._jobs(chance, chance.randint(*TOKENS))


async def customer(door: Door, work: Work, chance: random.Random) -> None:
    """Asks one thing after the other over a connection that it keeps."""
    line = Line(door.port, a_key(chance))
    try:
        while (job := work.next(chance)) is not None:
            stream = chance.random() < 0.5
            leave = chance.randint(1, 3) if stream and chance.random() < LEAVE * 2 else None
            await answered(line, door, job, work.tally, chance, stream=stream, leave_after=leave)
    finally:
        line.close()


async def answered(
    line: Line,
    door: Door,
    job: Job,
    tally: Tally,
    chance: random.Random,
    *,
    stream: bool = False,
    leave_after: int | None = None,
    pause_s: float = 0.0,
) -> None:
    """Ask until there is an answer; again where its process was killed, or refuses."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        began = time.monotonic()
        wait_s = chance.uniform(*AGAIN_S)
        try:
            async with asyncio.timeout(PATIENCE_S):
                said = await line.complete(job, stream=stream, leave_after=leave_after, pause_s=pause_s)
        except (OSError, EOFError) as error:  # a TimeoutError is an OSError
            line.close()
            said = Said(error="cut")
            tally.cut += not isinstance(error, ConnectionRefusedError)
            if isinstance(error, TimeoutError) or not door.troubled(began):
                tally.lost += 1
                tally.find(f"a customer of the {door.name}: {error!r} after {time.monotonic() - began:.1f} s")
                break
        tally.judge(job, said.text, whole=not (said.left or said.error), who=f"a customer of the {door.name}")
        if not said.error:
            tally.left += said.left
            tally.tokens += job.max_tokens if not said.left else 0
            break
        late = said.head_s > HEAD_S  # this client was: it was taken for one that never speaks
        again = said.status in (429, 503) or (said.status == 408 and late)
        if again or (said.status and door.troubled(began)):
            tally.refused[f"{said.status} {said.error}"] += 1
            wait_s = max(wait_s, min(said.retry_s, 2.0))
            line.close()
        elif said.status:
            tally.lost += 1
            tally.find(f"a customer of the {door.name}: {said.status} {said.error}: {said.about}")
            break
        if time.monotonic() > deadline:
            tally.lost += 1
            tally.find(f"a customer of the {door.name} had no answer in {PATIENCE_S:.0f} s, at last: {said}")
            break
        await asyncio.sleep(wait_s)
    tally.sessions[door.name] += 1


class CutLink(VerifierLink):
    """An edge's link that breaks when it is told to."""

    def __init__(self, server: str, api_key: str | None, **more: Any) -> None:
        super().__init__(server, api_key, **more)
        self._socket: ClientConnection | None = None
        self._others: list[CutLink] = []  # to replicas

    async def _write(self, socket: ClientConnection) -> None:
        self._socket = socket
        await super()._write(socket)

    def _redirected(self, address: str) -> VerifierLink:
        plain = super()._redirected(address)
        link = CutLink(plain.url, plain.api_key, fingerprint=plain.fingerprint, once=True)
        self._others = [*(other for other in self._others if not other.ended), link]
        return link

    def cut(self) -> None:
        """Without a word."""
        for link in (self, *self._others):
            if link._socket is not None:
                link._socket.transport.abort()


class Device:
    """An edge of this process that drafts, and several of its sessions at a time. The code is the product's."""

    def __init__(self, stack: Stack, key: str, seed: int) -> None:
        server = f"http://127.0.0.1:{stack.router.port}"
        self.link = CutLink(server, key, give_up_s=PATIENCE_S)
        policies = Policies("fixed:4", server_mode=False)
        ahead = Ahead() if seed % 2 else None
        self.backend = EdgeBackend(self.link, TokenizerCache(server), HashDraft(seed), policies, ahead)

    async def run(self, work: Work, chance: random.Random, sessions: int) -> None:
        """Until there is no more work."""
        self.link.start()
        try:
            sources = [random.Random(chance.getrandbits(64)) for _ in range(sessions)]
            await asyncio.gather(*(self._one_after_another(work, source) for source in sources))
        finally:
            work.tally.reconnects += self.link.reconnects
            await self.link.close()
            self.backend.close()

    async def _one_after_another(self, work: Work, chance: random.Random) -> None:
        while (job := work.next(chance)) is not None:
            await self._session(job, work.tally, chance)

    async def _session(self, job: Job, tally: Tally, chance: random.Random) -> None:
        said: tuple[int, ...] = ()
        leave = chance.random() < LEAVE
        cut = chance.random() < CUT
        task = Generation(list(job.prompt.encode()), Sampling(seed=job.seed), job.max_tokens, ignore_eos=True)
        items = self.backend.generate(task)
        finish = ""
        try:
            async with asyncio.timeout(PATIENCE_S):
                async for item in items:
                    said += tuple(item.tokens)
                    finish = item.finish or finish
                    if leave and not finish:
                        tally.left += 1
                        break
                    if cut and not finish:
                        cut = False
                        tally.faults["connections cut"] += 1
                        self.link.cut()
        except (WispError, TimeoutError) as error:
            tally.lost += 1
            tally.find(f"a device: {error!r} after {len(said)} of {job.max_tokens} tokens")
        else:
            tally.judge(job, said, whole=bool(finish), who="a device")
            tally.tokens += len(said)
        finally:
            await items.aclose()  # type: ignore[attr-defined]
        tally.sessions["device"] += 1
