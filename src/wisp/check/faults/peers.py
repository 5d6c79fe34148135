"""Peers that are not this release's edges: one of the release before, and ones that hold a key and send nonsense.

They speak to the session socket with frames of their own. A hostile one looks at what comes back, too: nothing of
another key's session may.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import msgspec
from websockets.exceptions import WebSocketException

from wisp.check.faults.engine import EOS, N_VOCAB, Text, tokenizer
from wisp.check.faults.sockets import VirtualConnect, VirtualSocket
from wisp.check.faults.users import some_prompt, some_tokens
from wisp.core.protocol.constraints import Constraints, Grammar
from wisp.core.protocol.messages import (
    VERSION,
    Branch,
    Cancel,
    Draft,
    Hello,
    Open,
    Redirect,
    Refused,
    Verdict,
    Welcome,
    decode_server_message,
    encode,
)
from wisp.core.protocol.sampling import Sampling
from wisp.core.protocol.slo import Slo

if TYPE_CHECKING:
    from wisp.check.faults.world import World

# Refusals that have nothing to do with what the peer said, and the one that an edge without a digest must be given.
FAIR = {
    "overloaded",
    "rate_limit_exceeded",
    "shutting_down",
    "engine_error",
    "logits_not_finite",
    "model_changed",
}
HEARD_S = 1.0  # how long a peer listens when it has said all
_pack = msgspec.msgpack.Encoder().encode


class Peer:
    """A connection, and what came over it."""

    def __init__(self, world: World, key: str, rng: random.Random) -> None:
        self.world, self.key, self.rng = world, key, rng
        self.own: set[str] = set()  # sessions that it has opened
        self.heard: list[Verdict | Refused | Redirect] = []

    def session(self, *, lies: bool = True) -> str:
        """A new name."""
        name = self.rng.randbytes(16).hex()
        self.own.add(name)
        if lies:
            self.world.liars.add(name)
        return name

    async def listen(self, socket: VirtualSocket) -> None:
        """Until nothing has come for a while."""
        try:
            while True:
                async with asyncio.timeout(HEARD_S):
                    self.take(decode_server_message(await socket.recv(decode=False)))
        except (TimeoutError, OSError):
            pass

    def take(self, message: object) -> None:
        if isinstance(message, Verdict):
            if message.session not in self.own:
                raise self.world.violated(f"a peer of {self.key} heard of session {message.session}")
            self.heard.append(message)
        elif isinstance(message, Refused | Redirect):
            self.heard.append(message)

    async def hello(self, socket: VirtualSocket, *, redirects: bool = True) -> Welcome | None:
        await socket.send(encode(Hello(VERSION, "", "peer", redirects)))
        async with asyncio.timeout(5.0):
            first = decode_server_message(await socket.recv(decode=False))
        if isinstance(first, Refused):
            self.heard.append(first)
        return first if isinstance(first, Welcome) else None


async def visit(
    world: World, address: str, key: str, what: Callable[[VirtualSocket], Awaitable[None]]
) -> None:
    """Connect, do `what`, and go. The network may break at any moment."""
    headers = {"Authorization": f"Bearer {key}"}
    with contextlib.suppress(OSError, TimeoutError, WebSocketException):
        async with VirtualConnect(address, additional_headers=headers, open_timeout=3.0) as socket:
            await what(socket)


# --- the release before


async def old_peer(world: World, address: str, key: str, rng: random.Random, *, router: bool) -> None:
    """An edge of 0.1.0: it follows no redirect, knows no digests, salts and constraints, and lets the server decode."""
    peer = Peer(world, key, rng)
    name = peer.session(lies=False)
    prompt = some_prompt(rng, world.shape.slot_tokens - 30)
    seed = rng.getrandbits(30)
    got: list[int] = []
    salt: list[int] = []

    def opening(epoch: int) -> bytes:
        sampling = [0.0, 0, 1.0, 0.0, seed]
        return _pack(["open", name, epoch, prompt, sampling, 24, 0, list(got), [], True, False, None, None])

    async def session(socket: VirtualSocket) -> None:
        await socket.send(_pack(["hello", VERSION, tokenizer().fingerprint, "wisp/0.1.0"]))
        async with asyncio.timeout(5.0):
            first = decode_server_message(await socket.recv(decode=False))
        if router:
            if isinstance(first, Welcome) and not first.digest:
                return  # one of its own release
            if not isinstance(first, Refused) or first.code != "version_mismatch":
                raise world.violated(f"a router took in an edge that follows no redirects: {first}")
            return
        if not isinstance(first, Welcome) or not first.digest:
            return
        salt.append(world.salts[first.digest])
        await socket.send(opening(len(salt)))
        had = len(got)
        while True:
            async with asyncio.timeout(3.0):
                message = decode_server_message(await socket.recv(decode=False))
            if isinstance(message, Refused):
                if had and message.code not in FAIR:
                    raise world.violated(f"an edge without a digest was refused as {message.code}")
                return
            if isinstance(message, Verdict):
                if had:
                    raise world.violated("an edge that does not say which model it began with may go on")
                got[message.base :] = message.tokens
                text = Text(salt[0], prompt, Sampling(seed=seed), 24, ignore_eos=False)
                if text.upto(len(got))[: len(got)] != got:
                    raise world.violated(f"an edge of the release before was given {got}")
                if message.finish or rng.random() < 0.1:
                    return

    await visit(world, address, key, session)
    if got and not router and EOS not in got and len(got) < 24:
        await visit(world, address, key, session)


async def old_server(
    scope: dict[str, Any],
    receive: Callable[[], Awaitable[dict[str, Any]]],
    send: Callable[[dict[str, Any]], Awaitable[None]],
) -> None:
    """A verifier of 0.1.0, as an ASGI application: it does not say which weights it runs, so no edge may use it."""
    await receive()
    await send({"type": "websocket.accept"})
    if (await receive())["type"] != "websocket.receive":
        return
    welcome = [
        "welcome",
        VERSION,
        "hash",
        tokenizer().fingerprint,
        N_VOCAB,
        [EOS],
        128,
        64,
        "hash",
        "exact",
        60.0,
    ]
    await send({"type": "websocket.send", "bytes": _pack(welcome)})
    await receive()


# --- nonsense


async def hostile_peer(world: World, address: str, key: str, rng: random.Random) -> None:
    """A few pieces of nonsense over one connection."""
    peer = Peer(world, key, rng)
    attacks = [rng.choice(ATTACKS) for _ in range(rng.randint(1, 3))]

    async def session(socket: VirtualSocket) -> None:
        if rng.random() < 0.1:
            await _bad_hello(peer, socket)
            return
        welcome = await peer.hello(socket)
        if welcome is None or not welcome.digest:
            return
        for attack in attacks:
            await attack(peer, socket, welcome)
        await peer.listen(socket)

    await visit(world, address, key, session)


async def _bad_hello(peer: Peer, socket: VirtualSocket) -> None:
    rng = peer.rng
    frames = (
        encode(Hello(0)),
        encode(Hello(2)),
        encode(Hello(VERSION, "another")),
        encode(Cancel("someone-else")),
        b"",
        b"\xc1",
        encode(Hello(VERSION))[:-1],
        _pack(["hello", "one"]),
    )
    await socket.send(rng.choice(frames))
    async with asyncio.timeout(12.0):
        first = decode_server_message(await socket.recv(decode=False))
    if not isinstance(first, Refused) and not (isinstance(first, Welcome) and not first.digest):
        raise peer.world.violated(f"nonsense was welcomed: {first}")


def _opening(peer: Peer, name: str, welcome: Welcome, **fields: Any) -> Open:
    rng = peer.rng
    given: dict[str, Any] = {
        "prompt": some_prompt(rng, 60),
        "sampling": Sampling(seed=rng.getrandbits(20)),
        "max_tokens": rng.randint(1, 24),
        "digest": welcome.digest,
    }
    return Open(name, fields.pop("epoch", 0), **{**given, **fields})


async def _absurd_open(peer: Peer, socket: VirtualSocket, welcome: Welcome) -> None:
    """Fields that no edge would send."""
    rng = peer.rng
    fields: list[dict[str, Any]] = [
        {"prompt": []},
        {"prompt": [-1]},
        {"prompt": [N_VOCAB]},
        {"prompt": [1 << 40]},
        {"prompt": [1] * (welcome.context + 5)},
        {"max_tokens": 0},
        {"max_tokens": -(1 << 60)},
        {"max_tokens": 1 << 60},
        {"logprobs": 21},
        {"logprobs": -1},
        {"committed": [1] * 30, "max_tokens": 30},
        {"committed": [EOS], "max_tokens": 9},
        {"committed": [N_VOCAB], "max_tokens": 9},
        {"draft": [1] * 65},
        {"draft": [-5]},
        {"draft": [1 << 33]},
        {"slo": Slo(-1.0, 5.0)},
        {"slo": Slo(math.nan, 5.0)},
        {"slo": Slo(0.0, math.inf)},
        {"slo": Slo(1e-300, 1e-300)},
        {"slo": Slo(1e9, 1e9)},
        {"sampling": Sampling(temperature=math.nan)},
        {"sampling": Sampling(temperature=-1.0)},
        {"sampling": Sampling(top_p=0.0)},
        {"sampling": Sampling(min_tokens=1 << 60, seed=1 << 62)},
        {"sampling": Sampling(ends=tuple(range(N_VOCAB)), min_tokens=5)},
        {"sampling": Sampling(constraints=Constraints(banned=((),)))},
        {"sampling": Sampling(constraints=Constraints(allowed=()))},
        {"sampling": Sampling(constraints=Constraints(allowed=(1 << 50,)))},
        {"sampling": Sampling(constraints=Constraints(logit_bias=((3, math.nan),)))},
        {"sampling": Sampling(constraints=Constraints(grammar=Grammar("json_object", "")))},
        {"sampling": Sampling(constraints=Constraints(grammar=Grammar("lark", "start: (", (1, 2))))},
        {"round": -(1 << 60)},
        {"round": 1 << 60},
        {"epoch": -(1 << 60)},
        {"digest": "another"},
        {"digest": "", "committed": [1]},
        {"avoid": "nobody:1"},
        {"salt": "x" * 64},
    ]
    for _ in range(rng.randint(1, 6)):
        await socket.send(encode(_opening(peer, peer.session(), welcome, **rng.choice(fields))))


async def _absurd_drafts(peer: Peer, socket: VirtualSocket, welcome: Welcome) -> None:
    """A session whose drafts are stale, early, repeated, wrong, or out of any range."""
    rng = peer.rng
    name = peer.session()
    serve = rng.random() < 0.3
    await socket.send(encode(_opening(peer, name, welcome, max_tokens=24, serve=serve)))
    for i in range(rng.randint(2, 10)):
        round_ = rng.choice((i + 1, i, 0, -1, 1 << 62, i + 1, i + 1))
        base = rng.choice((0, 0, 1, 2, 5, -1, 1000, -(1 << 62)))
        tokens = rng.choice(
            ([], some_tokens(rng, 4), some_tokens(rng, 30), [N_VOCAB], [-1], [1] * 65, [EOS, EOS])
        )
        await socket.send(
            encode(Draft(name, round_, base, tokens, rng.random() < 0.3, _absurd_branches(rng)))
        )
        if rng.random() < 0.5:
            await asyncio.sleep(rng.uniform(0.0, 0.05))
    if rng.random() < 0.5:
        await socket.send(encode(Cancel(name)))
        await socket.send(encode(Draft(name, 99, 0, [1])))


def _absurd_branches(rng: random.Random) -> list[Branch]:
    """None, for the most part; or ones that begin anywhere and go on with anything."""
    branches = []
    for _ in range(rng.choice((0, 0, 0, 1, 2, 4, 5, 200))):
        accepted = rng.choice((0, 0, 1, 2, 3, -1, 30, 1 << 62))
        token = rng.choice((*some_tokens(rng, 2), EOS, -1, N_VOCAB, 1 << 40))
        tokens = rng.choice(([], some_tokens(rng, 4), some_tokens(rng, 4), [EOS, 1], [N_VOCAB], [1] * 64))
        branches.append(Branch(accepted, token, tokens))
    return branches


async def _epochs(peer: Peer, socket: VirtualSocket, welcome: Welcome) -> None:
    """One session, opened again and again: other epochs, histories, prompts, parameters."""
    rng = peer.rng
    name = peer.session()
    first = _opening(peer, name, welcome, max_tokens=24)
    await socket.send(encode(first))
    for epoch in range(1, rng.randint(2, 6)):
        changes: list[dict[str, Any]] = [
            {},
            {"epoch": epoch - 1},
            {"prompt": some_tokens(rng, 9)},
            {"max_tokens": 23},
            {"committed": some_tokens(rng, 3)},
            {"serve": True},
            {"salt": "other"},
            {"logprobs": 3},
            {"round": rng.randint(0, 9), "draft": some_tokens(rng, 5)},
        ]
        again = msgspec.structs.replace(first, **{"epoch": epoch, **rng.choice(changes)})
        await socket.send(encode(again))
        if rng.random() < 0.5:
            await asyncio.sleep(rng.uniform(0.0, 0.05))


async def _steal(peer: Peer, socket: VirtualSocket, welcome: Welcome) -> None:
    """Other keys' sessions, by their names."""
    names = [n for n in peer.world.names() if n not in peer.own]
    for name in peer.rng.sample(names, min(3, len(names))):
        await socket.send(encode(Draft(name, 5, 0, [1])))
        await socket.send(encode(Cancel(name)))
        if peer.world.key_of(name) != peer.key:
            await socket.send(encode(_opening(peer, name, welcome, epoch=1 << 40)))
            peer.world.liars.add(name)
            peer.own.add(name)  # where nobody has it, it is a name like another


async def _flood(peer: Peer, socket: VirtualSocket, welcome: Welcome) -> None:
    """As many sessions as there are places for, and more; some are never spoken of again."""
    rng = peer.rng
    for _ in range(rng.randint(5, 40)):
        name = peer.session()
        await socket.send(encode(_opening(peer, name, welcome, serve=rng.random() < 0.3)))
        if rng.random() < 0.2:
            await socket.send(encode(Cancel(name)))


async def _garbage(peer: Peer, socket: VirtualSocket, welcome: Welcome) -> None:
    """Frames that are not messages: cut, changed in a byte, of the other side, or noise."""
    rng = peer.rng
    whole = encode(_opening(peer, peer.session(), welcome, draft=[1, 2, 3]))
    for _ in range(rng.randint(1, 8)):
        kind = rng.randrange(6)
        changed = bytearray(whole)
        changed[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        frame = (
            whole[: rng.randrange(len(whole))],
            bytes(changed),
            rng.randbytes(rng.randrange(40)),
            encode(Verdict(peer.session(), 0, 0, 0, [1])),
            encode(Hello(VERSION)),
            b"\xdd\xff\xff\xff\xff",
        )[kind]
        if kind == 1:
            try:  # a changed byte may be of a name or a prompt: then it is a session of ours
                name = getattr(msgspec.msgpack.decode(frame, type=Open), "session", "")
            except (msgspec.DecodeError, UnicodeDecodeError):
                name = ""
            if name:
                peer.own.add(name)
                peer.world.liars.add(name)
        await socket.send(frame)


async def _liar(peer: Peer, socket: VirtualSocket, welcome: Welcome) -> None:
    """A history that the target never wrote, which it goes on from."""
    rng = peer.rng
    committed = [t for t in some_tokens(rng, rng.randint(1, 12)) if t != EOS]
    opening = _opening(peer, peer.session(), welcome, committed=committed, max_tokens=30, serve=True)
    await socket.send(encode(opening))


async def _silent(peer: Peer, socket: VirtualSocket, welcome: Welcome) -> None:
    """Sessions that take a slot, and say nothing more."""
    for _ in range(peer.rng.randint(1, 4)):
        await socket.send(encode(_opening(peer, peer.session(), welcome)))
    await asyncio.sleep(peer.rng.uniform(0.5, 4.0))


ATTACKS = (
    _absurd_open,
    _absurd_open,
    _absurd_drafts,
    _absurd_drafts,
    _epochs,
    _steal,
    _flood,
    _garbage,
    _liar,
    _silent,
)
