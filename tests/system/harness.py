"""Whole processes on loopback for tests: start, await, kill, read their logs, talk to them.

`Fleet` starts `wisp serve` and `wisp edge` as children and always ends them. `ask` and `Stream` are OpenAI
clients that see every byte; `Peer` speaks the session protocol by hand; `Cutter` is a line that breaks.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import msgspec
from websockets.sync.client import ClientConnection, connect
from websockets.typing import Subprotocol

from waiting import PATIENCE_S, eventually
from wisp.api.scrape import read_page
from wisp.core.protocol.messages import (
    SUBPROTOCOL,
    VERSION,
    Hello,
    Message,
    Open,
    Refused,
    ServerMessage,
    Verdict,
    Welcome,
    decode_server_message,
    encode,
)
from wisp.core.protocol.sampling import Sampling
from wisp.engines.build import served_name

# The pair that ships with the package; other files may stand in for it.
TARGET = os.environ.get("WISP_TEST_TARGET", "tiny-target")
DRAFT = os.environ.get("WISP_TEST_DRAFT", "tiny-draft")
MODEL = served_name(TARGET)
ENGINE = os.environ.get("WISP_TEST_ENGINE", "llama.cpp")  # `make test-vllm` runs the same tests on vLLM
MODE = "exact" if ENGINE == "llama.cpp" else "fast"

START_S = PATIENCE_S if ENGINE == "llama.cpp" else 600.0  # vLLM: ten seconds of CPU for each of its processes
# Without `verify`: certificates are for the edges to check, and loading them for each request takes long.
HTTP: dict[str, Any] = {"trust_env": False, "timeout": PATIENCE_S, "verify": False}


# Below the ports that the system gives to outgoing connections, or one of those could take a port before it is used.
# Above each there is room for the replicas of a router, and the last of ten is the claim on all of them: other
# processes of tests take ports at the same time.
PORTS = itertools.cycle(20_000 + (os.getpid() * 37 + n) % 1_200 * 10 for n in range(1_200))
CLAIM = 9
CLAIMS = 100  # more than one test needs; the oldest are given back
claims: deque[int] = deque()  # file descriptors


def free_port() -> int:
    """A loopback port that nobody uses, and that no other process of tests is about to use."""
    for port in PORTS:
        claim = socket.socket()
        with socket.socket() as probe, contextlib.suppress(OSError):
            claim.bind(("127.0.0.1", port + CLAIM))
            probe.bind(("127.0.0.1", port))
            claims.append(claim.detach())
            if len(claims) > CLAIMS:
                os.close(claims.popleft())
            return port
        claim.close()
    raise AssertionError("PORTS has no end")


# --- processes


class Process:
    """One `wisp` command that serves on `port`."""

    def __init__(self, name: str, arguments: list[str], port: int, env: Mapping[str, str], log: Path) -> None:
        self.name = name
        self.port = port
        self.log_path = log
        self._command = [sys.executable, "-m", "wisp.cli", *arguments]
        self._env = dict(env)
        self.scheme = "http"
        self.start()

    def start(self) -> None:
        """Start (again, with the same flags), in a process group of its own."""
        with self.log_path.open("ab") as log:
            self.popen = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._env,
                process_group=0,
            )

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        return self.popen.pid

    def log(self) -> str:
        """Everything it has logged."""
        return self.log_path.read_text(errors="replace")

    def health(self) -> int:
        """The status of /health; 0 while nobody listens."""
        try:
            return httpx.get(f"{self.url}/health", **HTTP).status_code
        except httpx.TransportError:
            return 0

    def health_body(self) -> dict[str, Any]:
        """What /health says."""
        return httpx.get(f"{self.url}/health", **HTTP).json()  # type: ignore[no-any-return]

    def wait_ready(self) -> Process:
        """Wait until /health is 200."""

        def ready() -> bool:
            assert self.popen.poll() is None, f"{self.name} ended with {self.popen.poll()}:\n{self.log()}"
            return self.health() == 200

        eventually(ready, START_S)
        return self

    def terminate(self) -> None:
        """SIGTERM."""
        self.popen.terminate()

    def kill(self) -> None:
        """kill -9, and wait for the end."""
        self.popen.kill()
        self.popen.wait()

    def wait(self, timeout_s: float = PATIENCE_S) -> int:
        """The exit status."""
        return self.popen.wait(timeout_s)

    def metrics(self) -> dict[str, float]:
        """/metrics by sample name, labels included as they are written, but for the model's name."""
        return read_page(httpx.get(f"{self.url}/metrics", **HTTP).text)


class Fleet:
    """Children of one test or module. Logs and caches live in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[Process] = []

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: TracebackType | None) -> None:
        for process in self.processes:
            process.popen.send_signal(signal.SIGKILL) if process.popen.poll() is None else None
        for process in self.processes:
            process.popen.wait()

    def serve(
        self,
        *flags: str,
        target: str = TARGET,
        engine: str = ENGINE,
        port: int = 0,
        env: Mapping[str, str] | None = None,
        ready: bool = True,
    ) -> Process:
        """`wisp serve`; a small one, and patient, unless flags say otherwise."""
        words = ["--target", target, "--engine", engine, "--threads", "1", "--slots", "4", "--context", "512"]
        words += ["--drain-s", "600"]
        return self._process("serve", [*words, *flags], port or free_port(), env, ready)

    def edge(
        self,
        server: str,
        *flags: str,
        draft: str = DRAFT,
        drafting: str = "fixed:4",
        env: Mapping[str, str] | None = None,
        ready: bool = True,
    ) -> Process:
        """`wisp edge` against the verifier at `server`, and patient. It always drafts, whether that pays or not."""
        words = ["--server", server, "--draft", draft, "--drafting", drafting]
        words += ["--threads", "1", "--keep-alive-s", "0.2", "--give-up-s", "600"]
        return self._process("edge", [*words, *flags], free_port(), env, ready)

    def run(self, *arguments: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """A `wisp` command, to its end."""
        return subprocess.run(
            [sys.executable, "-m", "wisp.cli", *arguments],
            env=self.environment(env),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )

    def environment(self, more: Mapping[str, str] | None = None) -> dict[str, str]:
        """This process's, without settings of WISP or proxies; one cache for the whole fleet."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith("WISP_")}
        ours = {"WISP_CACHE": str(self.folder / "cache"), "WISP_OFFLINE": "1", "COLUMNS": "200"}
        return kept | {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"} | ours | dict(more or {})

    def _process(
        self, command: str, flags: list[str], port: int, env: Mapping[str, str] | None, ready: bool
    ) -> Process:
        name = f"{command}-{len(self.processes)}"
        arguments = [command, *flags, "--port", str(port)]
        process = Process(name, arguments, port, self.environment(env), self.folder / f"{name}.log")
        self.processes.append(process)
        return process.wait_ready() if ready else process


# --- OpenAI clients that see every byte


@dataclass
class Answer:
    """What came of a request. `error` is OpenAI's error object; `comments` counts SSE keep-alives."""

    status: int = 200
    text: str = ""
    finish: str = ""
    usage: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    error: dict[str, Any] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    token_bytes: list[bytes] = field(default_factory=list)
    comments: int = 0
    done: bool = False

    @property
    def spec(self) -> dict[str, Any]:
        return self.metrics["speculative_decoding"]  # type: ignore[no-any-return]

    def take(self, body: dict[str, Any]) -> None:
        """A whole answer, or one event of a stream."""
        self.error = body.get("error") or self.error
        self.usage = body.get("usage") or self.usage
        self.metrics = body.get("metrics") or self.metrics
        for choice in body.get("choices", ()):
            said = choice.get("delta") or choice.get("message") or {"content": choice.get("text")}
            self.text += said.get("content") or ""
            self.finish = choice["finish_reason"] or self.finish
            entries = (choice.get("logprobs") or {}).get("content") or ()
            self.token_bytes += [bytes(e["bytes"] or ()) for e in entries]


def body_of(prompt: str, **parameters: Any) -> dict[str, Any]:
    """A chat request; greedy unless `parameters` say otherwise."""
    messages = [{"role": "user", "content": prompt}]
    return {"model": MODEL, "messages": messages, "temperature": 0.0, "max_tokens": 48, **parameters}


class Stream:
    """A streamed chat answer that is read event by event."""

    def __init__(self, url: str, prompt: str, *, key: str = "", **parameters: Any) -> None:
        self._client = httpx.Client(**HTTP)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        options = {"stream": True, "stream_options": {"include_usage": True}}
        request = self._client.build_request(
            "POST",
            f"{url}/v1/chat/completions",
            json=body_of(prompt, **options, **parameters),
            headers=headers,
        )
        self._response = self._client.send(request, stream=True)
        self.answer = Answer(self._response.status_code, headers=dict(self._response.headers))
        if self.answer.status != 200:
            self.answer.take(json.loads(self._response.read()))
        self._lines = self._response.iter_lines()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()

    def events(self) -> Iterator[Answer]:
        """The answer so far, after each event or comment."""
        if self.answer.status != 200:
            return
        for line in self._lines:
            if line.startswith(":"):
                self.answer.comments += 1
            elif line == "data: [DONE]":
                self.answer.done = True
            elif line.startswith("data: "):
                self.answer.take(json.loads(line[6:]))
            else:
                continue
            yield self.answer

    def until(self, enough: Callable[[Answer], bool]) -> Answer:
        """Read until there is enough."""
        for answer in self.events():
            if enough(answer):
                return answer
        raise AssertionError(f"the stream ended first: {self.answer}")

    def rest(self) -> Answer:
        """Read to the end."""
        for _ in self.events():
            pass
        self.leave()
        return self.answer

    def leave(self) -> None:
        """Hang up."""
        self._response.close()
        self._client.close()


def ask(url: str, prompt: str, *, stream: bool = False, key: str = "", **parameters: Any) -> Answer:
    """One chat answer, whole."""
    if stream:
        return Stream(url, prompt, key=key, **parameters).rest()
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    response = httpx.post(
        f"{url}/v1/chat/completions", json=body_of(prompt, **parameters), headers=headers, **HTTP
    )
    answer = Answer(response.status_code, headers=dict(response.headers))
    answer.take(response.json())
    return answer


# --- the session protocol by hand


HELLO = Hello(VERSION)


class Peer:
    """An edge that says exactly what it is told to."""

    def __init__(self, url: str, *, key: str = "", hello: Hello | None = HELLO) -> None:
        self._stack = ExitStack()
        connection = connect(
            url.replace("http", "ws", 1) + "/v1/sessions",
            subprotocols=[Subprotocol(SUBPROTOCOL)],
            additional_headers={"Authorization": f"Bearer {key}"} if key else {},
            compression=None,
            proxy=None,
            max_size=None,
            open_timeout=PATIENCE_S,
            ping_interval=None,
            close_timeout=1,
        )
        self.socket: ClientConnection = self._stack.enter_context(connection)
        if hello is not None:
            self.say(hello)
            welcome = self.hear()
            assert isinstance(welcome, Welcome), welcome
            self.welcome = welcome

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def say(self, message: Message | bytes | str) -> None:
        """Send. What an Open has committed is this verifier's text, unless it says otherwise."""
        if isinstance(message, Open) and message.committed and not message.digest:
            message = msgspec.structs.replace(message, digest=self.welcome.digest)
        self.socket.send(encode(message) if isinstance(message, Message) else message)

    def hear(self, timeout_s: float = PATIENCE_S) -> ServerMessage:
        frame = self.socket.recv(timeout_s)
        assert isinstance(frame, bytes)
        return decode_server_message(frame)

    def verdict(self) -> Verdict:
        message = self.hear()
        assert isinstance(message, Verdict), message
        return message

    def refused(self) -> Refused:
        message = self.hear()
        assert isinstance(message, Refused), message
        return message

    def open(self, session: str, **fields: Any) -> Verdict:
        """Open a session and take the first verdict."""
        self.say(opening(session, **fields))
        return self.verdict()


def opening(session: str, **fields: Any) -> Open:
    """An Open with small defaults."""
    return msgspec.structs.replace(Open(session, 0, [1, 2, 3], Sampling(seed=7), 20), **fields)


# --- a line that breaks


class Cutter:
    """A TCP proxy to `port` that aborts connections in the middle of a frame.

    Each connection may carry a random number of bytes, from `budget`; of the chunk that goes beyond it only a
    part is passed on, and then both sides are reset. `cut` resets everything now.
    """

    def __init__(self, port: int, seed: int, budget: tuple[int, int] = (2_000, 9_000)) -> None:
        self._to = port
        self._random = random.Random(seed)
        self._budget = budget
        self._lines: set[asyncio.StreamWriter] = set()
        self.broken = 0
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._main, daemon=True)
        self._thread.start()
        self._started.wait()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def cut(self) -> None:
        """Reset every connection now."""
        self._loop.call_soon_threadsafe(self._cut)

    def _cut(self) -> None:
        self.broken += bool(self._lines)
        for line in list(self._lines):
            line.transport.abort()

    def _main(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        self._stop = asyncio.Event()
        server = await asyncio.start_server(self._line, "127.0.0.1", 0)
        self.port = int(server.sockets[0].getsockname()[1])
        self._started.set()
        await self._stop.wait()
        server.close()
        self._cut()

    async def _line(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self._to)
        except OSError:  # the verifier is away
            writer.transport.abort()
            return
        left = [self._random.randint(*self._budget)]
        self._lines |= {writer, back}
        ways = [
            asyncio.ensure_future(self._pass_on(reader, back, left)),
            asyncio.ensure_future(self._pass_on(there, writer, left)),
        ]
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        for way in ways:
            way.cancel()
        for end in (writer, back):
            self._lines.discard(end)
            end.transport.abort()

    async def _pass_on(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, left: list[int]
    ) -> None:
        try:
            while data := await reader.read(65536):
                part, left[0] = data[: max(0, left[0])], left[0] - len(data)
                writer.write(part)
                await writer.drain()
                if left[0] < 0:
                    await asyncio.sleep(0.005)  # let the fragment out before the reset
                    self.broken += 1
                    return
        except (ConnectionError, OSError):
            return
