"""A verifier under fire: frames and bodies near valid ones from several keys, beside honest sessions whose texts are
known. What must not be: another text, an error of the server's own, memory that grows, anything left behind.

The engine has no model, so the text of a session follows from its seed, and the verifier's own work is all there is.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import re
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import WebSocketException
from websockets.typing import Subprotocol

from fuzz.bodies import BODIES
from fuzz.mutate import Mutator
from fuzz.running import Finding, Part
from fuzz.wire import EDGE_MESSAGES, plain
from harness import Fleet, Process
from wisp.core.errors import ProtocolError
from wisp.core.protocol.messages import (
    SUBPROTOCOL,
    VERSION,
    Cancel,
    Draft,
    Hello,
    Message,
    Open,
    Refused,
    Verdict,
    Welcome,
    decode_server_message,
    encode,
)
from wisp.core.protocol.sampling import Sampling
from wisp.engines.grammars import KEPT
from wisp.engines.null import null_token

FRAMES = 1_000_000
BODIES_PER_FRAME = 0.1
AHEAD = 200  # bodies that frames may be ahead
KEYS = "".join(f'[keys.{name}]\nsecret = "{name}s secret"\n' for name in ("honest", "m0", "m1", "m2", "m3"))
LINES = 4  # connections with frames, and as many with bodies: one of each key
PIECE = 500  # frames before a line's Mutator is another one, and often a new connection
LAST = "session-of-the-last-frame"  # which nobody opens
MAX_TOKENS = 24
INPUTS_PER_HONEST = 400  # for each of three kinds of honest session
KNOCK_S = 0.2
FLAT_KB = 12 << 10  # that a server may grow by after its first tenth
CURVE = 40  # points of the memory's curve
# Each of glibc's arenas keeps free memory of its own: 25 MB in all after 350,000 frames. With one, what grows is in use
ONE_ARENA = {"MALLOC_ARENA_MAX": "1"}
WAIT_S = 900.0  # for anything that comes within seconds on a quiet machine
PATHS = {
    "chat": "/v1/chat/completions",
    "completion": "/v1/completions",
    "response": "/v1/responses",
    "anthropic": "/v1/messages",
    "tokens": "/tokenize",
}


class Fire:
    """One run. `part` is what came of it; `left` what is still to be sent."""

    def __init__(self, server: Process, edge: Process, frames: int, seed: int) -> None:
        self.server, self.edge, self.seed = server, edge, seed
        self.part = Part("live", seed)
        self.frames, self.bodies = frames, int(frames * BODIES_PER_FRAME)
        self.sent_frames = self.sent_bodies = 0
        self.honest = 0
        self.statuses: dict[int, int] = {}
        self.over = asyncio.Event()

    def find(self, what: str, sent: bytes = b"") -> None:
        if len(self.part.findings) < 20:
            self.part.findings.append(Finding("live", what, repr(sent[:2000])))

    # --- frames

    async def frames_line(self, number: int) -> None:
        """Connections of one key, one after the other, with mutated frames."""
        for piece in itertools.count():
            if self.sent_frames >= self.frames:
                return
            while self.sent_frames * BODIES_PER_FRAME > self.sent_bodies + AHEAD:
                await asyncio.sleep(0.01)  # frames cost far less than bodies, and would be over first
            inputs = self._frames_of(number, piece)
            try:
                async with self._socket(f"m{number}s secret") as socket:
                    drain = asyncio.create_task(self._drain(socket))
                    try:
                        await self._fire(socket, inputs)
                        await asyncio.wait_for(drain, WAIT_S)  # all of it was read, and answered
                    finally:
                        drain.cancel()
                        await asyncio.gather(drain, return_exceptions=True)
            except (WebSocketException, OSError):
                continue  # cut off, as it may be

    def _frames_of(self, number: int, piece: int) -> Mutator:
        digest = self.digest
        chance = random.Random(f"{self.seed}/{number}/{piece}")
        ids = [f"session-{number}-{chance.randrange(40)}" for _ in range(6)]
        prompt = [chance.randrange(256) for _ in range(5)]
        opens: list[Message] = [
            Open(id_, chance.randrange(9), prompt, Sampling(seed=i), 12, digest=digest)
            for i, id_ in enumerate(ids)
        ]
        drafts: list[Message] = [
            Draft(id_, chance.randrange(4), chance.randrange(4), [1, 2, 3]) for id_ in ids
        ]
        cancels: list[Message] = [Cancel(id_) for id_ in ids[:2]]
        examples = [plain(m) for m in (*opens, *drafts, *cancels, *EDGE_MESSAGES)]
        return Mutator(examples, msgspec.msgpack.encode, f"live/{self.seed}/{number}/{piece}", torn=0.1)

    async def _fire(self, socket: ClientConnection, inputs: Mutator) -> None:
        for _ in range(PIECE):
            frame = inputs.input()[: 1 << 18]
            self.sent_frames += 1
            await socket.send(frame)
        await socket.send(encode(Draft(LAST, 1, 0, [])))

    async def _drain(self, socket: ClientConnection) -> None:
        """Until the answer to the last frame."""
        with contextlib.suppress(WebSocketException):
            async for frame in socket:
                try:
                    said = decode_server_message(frame if isinstance(frame, bytes) else b"\xc1")
                except ProtocolError as error:
                    self.find(f"the verifier said what is no message: {error}")
                    continue
                if isinstance(said, Refused) and said.session == LAST:
                    return

    @contextlib.asynccontextmanager
    async def _socket(self, key: str) -> Any:
        async with connect(
            self.server.url.replace("http", "ws", 1) + "/v1/sessions",
            subprotocols=[Subprotocol(SUBPROTOCOL)],
            additional_headers={"Authorization": f"Bearer {key}"},
            compression=None,
            proxy=None,
            open_timeout=WAIT_S,
            close_timeout=1,
        ) as socket:
            await socket.send(encode(Hello(VERSION)))
            welcome = decode_server_message(await asyncio.wait_for(socket.recv(decode=False), WAIT_S))
            assert isinstance(welcome, Welcome), welcome
            self.digest = welcome.digest
            yield socket

    # --- bodies

    async def bodies_line(self, number: int) -> None:
        """Requests of one key, one after the other, with mutated bodies, and now and then a mutated head."""
        kinds = list(BODIES)
        for piece in itertools.count():
            if self.sent_bodies >= self.bodies:
                return
            kind = kinds[piece % len(kinds)]
            seed = f"live/{self.seed}/bodies/{number}/{piece}"
            short = {"model": None, "max_output_tokens" if kind == "response" else "max_tokens": 4}
            inputs = Mutator([{**body, **short} for body in BODIES[kind]], msgspec.json.encode, seed)
            for i in range(50):
                body = inputs.input()
                head = _head(PATHS[kind], f"m{number}s secret", len(body))
                if i % 50 == 49:
                    head = Mutator([head], _raw, f"{seed}/{i}").input()
                    await self._knock(head + body)
                    continue
                self.sent_bodies += 1
                await self._request(head + body)

    async def _request(self, request: bytes) -> None:
        try:
            answer = await asyncio.wait_for(self._answered(request), WAIT_S)
        except TimeoutError:
            self.find(f"no answer within {WAIT_S:g} s", request)
            return
        except OSError:
            return
        status = int(answer[9:12]) if re.match(rb"HTTP/1\.1 \d{3}", answer) else 0
        self.statuses[status] = self.statuses.get(status, 0) + 1
        if status >= 500 and b"overloaded" not in answer:
            self.find(f"status {status}: {answer[-300:]!r}", request)

    async def _knock(self, request: bytes) -> None:
        """What may be no request at all: nobody waits for its answer."""
        self.sent_bodies += 1
        with contextlib.suppress(OSError, TimeoutError):
            reader, writer = await asyncio.open_connection("127.0.0.1", self.server.port)
            writer.write(request)
            await asyncio.wait_for(reader.read(1), KNOCK_S)
            writer.close()

    async def _answered(self, request: bytes) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.server.port, limit=1 << 22)
        try:
            writer.write(request)
            with contextlib.suppress(ConnectionError):
                await writer.drain()
            return await reader.read(-1)
        finally:
            writer.close()

    async def fill_caches(self) -> None:
        """Have as many grammars compiled for each key as are kept, or memory would grow until they are."""
        for number in range(LINES):
            for i in range(KEPT):
                schema = {
                    "type": "object",
                    "properties": {f"p{i}": {"type": "integer"}},
                    "required": [f"p{i}"],
                }
                body = msgspec.json.encode({"prompt": "a", "max_tokens": 1, "guided_json": schema})
                await self._request(_head(PATHS["completion"], f"m{number}s secret", len(body)) + body)

    # --- honest sessions

    async def honest_line(self, ask: Callable[[int], Awaitable[str]]) -> None:
        """Sessions whose text is known, one after the other: one for every so many inputs, as they cost far more."""
        asked = 0
        while not self.over.is_set():
            if asked * INPUTS_PER_HONEST > self.sent_frames + self.sent_bodies:
                await asyncio.sleep(0.01)
                continue
            asked += 1
            self.honest += 1
            seed = self.honest
            try:
                problem = await asyncio.wait_for(ask(seed), WAIT_S)
            except (OSError, WebSocketException, TimeoutError) as error:
                problem = f"was lost: {error!r}"
            if problem:
                self.find(f"an honest session {problem}")

    async def honest_edge(self, seed: int) -> str:
        """By hand, with drafts that are right as far as chance has it."""
        truth = [null_token(seed, position) for position in range(MAX_TOKENS)]
        chance, committed, session, round_ = random.Random(seed), list[int](), f"honest-session-{seed}", 0
        heard: list[Message] = []
        async with self._socket("honests secret") as socket:
            message: Message = Open(
                session, 0, [1, 2, 3], Sampling(seed=seed), MAX_TOKENS, digest=self.digest
            )
            await socket.send(encode(message))
            while len(committed) < MAX_TOKENS:
                said = decode_server_message(await socket.recv(decode=False))
                if isinstance(said, Refused) and said.code == "overloaded":
                    return ""
                heard.append(said)
                # While a draft was on its way the verifier may have decoded by itself: its verdicts then overlap.
                if not isinstance(said, Verdict) or said.base > len(committed):
                    return f"was answered {said} to {message} after {heard}"
                if said.tokens != truth[said.base : said.base + len(said.tokens)]:
                    return f"of seed {seed} was told {said} after {heard}, but its text is {truth}"
                committed += said.tokens[len(committed) - said.base :]
                at, size, round_ = len(committed), chance.randrange(5), round_ + 1
                draft = truth[at : at + size] if chance.random() < 0.7 else [9] * size
                message = Draft(session, round_, at, draft)
                await socket.send(encode(message))
        return ""

    def honest_client(self, process: Process) -> Callable[[int], Awaitable[str]]:
        """Over HTTP: without an edge, or through one."""

        async def ask(seed: int) -> str:
            body = msgspec.json.encode(
                {"prompt": "abc", "seed": seed, "max_tokens": MAX_TOKENS, "temperature": 1.0}
            )
            reader, writer = await asyncio.open_connection("127.0.0.1", process.port)
            try:
                writer.write(_head("/v1/completions", "honests secret", len(body)) + body)
                answer = await reader.read(-1)
            finally:
                writer.close()
            head, _, rest = answer.partition(b"\r\n\r\n")
            if b" 200 " not in head.split(b"\r\n")[0]:
                return "" if b"overloaded" in rest else f"was answered {answer[:300]!r}"
            text = msgspec.json.decode(rest)["choices"][0]["text"]
            truth = bytes(null_token(seed, i) for i in range(MAX_TOKENS)).decode("utf-8", "replace")
            return "" if text == truth else f"of seed {seed} has the text {text!r} instead of {truth!r}"

        return ask

    # --- all of it

    async def run(self) -> None:
        async with self._socket("honests secret"):
            pass  # for the digest
        await self.fill_caches()
        honest = [
            asyncio.create_task(self.honest_line(ask))
            for ask in (self.honest_edge, self.honest_client(self.server), self.honest_client(self.edge))
        ]
        watch = asyncio.create_task(self._watch())
        fire = [line(number) for number in range(LINES) for line in (self.frames_line, self.bodies_line)]
        await asyncio.gather(*fire)
        self.over.set()
        await asyncio.gather(*honest, watch)
        await self._check_end()
        self.part.count = self.sent_frames + self.sent_bodies
        self.part.taken = self.statuses.get(200, 0)
        self.part.refused = sum(n for status, n in self.statuses.items() if 400 <= status < 500)

    async def _watch(self) -> None:
        """Memory from the first tenth on."""
        memory = psutil.Process(self.server.pid).memory_info
        while self.sent_frames < self.frames / 10 and not self.over.is_set():
            await asyncio.sleep(0.2)
        warm, at = memory().rss, self.sent_frames
        shown = time.monotonic()
        while not self.over.is_set():
            await asyncio.sleep(0.5)
            if self.sent_frames >= at + len(self.part.curve) * self.frames / CURVE:
                self.part.curve.append((self.sent_frames, (memory().rss - warm) >> 10))
            if self.server.popen.poll() is not None:
                self.find(f"the verifier ended with {self.server.popen.poll()}")
                raise ConnectionError("the verifier is gone")
            if time.monotonic() - shown > 30:
                shown = time.monotonic()
                sent = f"{self.sent_frames:,} frames, {self.sent_bodies:,} bodies, {self.honest:,} honest"
                print(f"{sent}, {(memory().rss - warm) >> 10:+,} kB", flush=True)
        self.part.grown_kb = (memory().rss - warm) >> 10
        if self.part.grown_kb > FLAT_KB:
            self.find(f"memory grew by {self.part.grown_kb} kB from frame {at} to {self.sent_frames}")

    async def _check_end(self) -> None:
        """Nothing is left, and the log has no error of the server's own."""
        for _ in range(int(WAIT_S * 5)):
            seen = await asyncio.to_thread(self.server.metrics)
            names = ("num_requests_running", "num_requests_parked", "kv_cache_usage_perc")
            left = [seen[f"wisp:{name}"] for name in names]
            if not any(left):
                break
            await asyncio.sleep(0.2)
        else:
            self.find(f"left behind (running, parked, KV): {left}")
        log = self.server.log()
        for bad in ("Traceback", "ERROR", "CRITICAL"):
            if bad in log:
                at = log.index(bad)
                self.find(f"the log says: {log[max(0, at - 200) : at + 1500]}")
        if "s secret" in log + self.edge.log():
            self.find("a key is in a log")


def _raw(value: Any) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode("utf-8", "replace")


def _head(path: str, key: str, size: int) -> bytes:
    return (
        f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {key}\r\ncontent-type: application/json\r\n"
        f"connection: close\r\ncontent-length: {size}\r\n\r\n"
    ).encode()


@contextlib.contextmanager
def under_fire() -> Iterator[tuple[Process, Process]]:
    """A verifier without a model, and an edge before it."""
    with tempfile.TemporaryDirectory() as folder, Fleet(Path(folder)) as fleet:
        keys = fleet.folder / "keys.toml"
        keys.write_text(KEYS)
        flags = (
            "--api-keys",
            str(keys),
            "--context",
            "128",
            "--slots",
            "16",
            "--park-s",
            "1",
            "--max-sessions",
            "200",
        )
        server = fleet.serve(*flags, target="null", engine="null", env=ONE_ARENA)
        edge = fleet.edge(server.url, draft="ngram", env={"WISP_API_KEY": "honests secret"})
        yield server, edge


def live(frames: int, seed: int) -> Part:
    """`frames` frames (0: a full run's), a tenth as many bodies, and honest sessions beside them."""
    with under_fire() as (server, edge):
        process = psutil.Process(server.pid)

        async def run() -> Part:
            fire = Fire(server, edge, frames or FRAMES, seed)
            await fire.run()
            fire.part.cpu_s = round(sum(process.cpu_times()[:2]), 1)
            print(f"honest sessions: {fire.honest:,}; statuses: {dict(sorted(fire.statuses.items()))}")
            return fire.part

        return asyncio.run(run())
