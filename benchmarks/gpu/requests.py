"""Streamed completions against a running server: tokens per second of all, and time per token of each."""

from __future__ import annotations

import asyncio
import json
import statistics
import time

import msgspec

SESSIONS = (1, 16, 64)
TOKENS = 128


class Load(msgspec.Struct):
    """Of so many requests at a time: tokens per second in all, median and 99th percentile of time per token, ms."""

    sessions: int
    tokens_per_s: float
    tpot_ms: float
    tpot_p99_ms: float


async def _stream(host: str, port: int, body: bytes) -> tuple[int, float, float]:
    """Tokens, and when the first and the last came."""
    reader, writer = await asyncio.open_connection(host, port)
    head = f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\nconnection: close\r\n"
    writer.write(head.encode() + f"content-length: {len(body)}\r\n\r\n".encode() + body)
    await writer.drain()
    status = await reader.readline()
    if b" 200 " not in status:
        raise RuntimeError(f"the server said {status.decode().strip()}")
    first, last, tokens = 0.0, 0.0, 0
    while line := await reader.readline():
        if line.startswith(b"data: {"):
            usage = json.loads(line[6:]).get("usage")
            tokens = usage["completion_tokens"] if usage else tokens
            last = time.perf_counter()
            first = first or last
    writer.close()
    return tokens, first, last


async def _load(host: str, port: int, sessions: int, tokens: int) -> Load:
    bodies = [
        json.dumps(
            {
                "prompt": f"Request {i}: count from one to a thousand.",
                "max_tokens": tokens,
                "temperature": 0.7,
                "top_p": 0.95,
                "seed": i,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        ).encode()
        for i in range(sessions)
    ]
    begun = time.perf_counter()
    done = await asyncio.gather(*(_stream(host, port, body) for body in bodies))
    took = time.perf_counter() - begun
    per_token = sorted((last - first) / max(1, n - 1) * 1e3 for n, first, last in done)
    return Load(
        sessions,
        round(sum(n for n, _, _ in done) / took, 1),
        round(statistics.median(per_token), 3),
        round(per_token[min(len(per_token) - 1, int(0.99 * len(per_token)))], 3),
    )


def loads(server: str, most: int, *, tiny: bool) -> list[Load]:
    """Of each number of sessions up to `most`: once to warm up, then once to be counted."""
    host, port = server.removeprefix("http://").split(":")
    found = []
    for sessions in (n for n in ((1, 4) if tiny else SESSIONS) if n <= most):
        for _ in range(2):
            load = asyncio.run(_load(host, int(port), sessions, 16 if tiny else TOKENS))
        found.append(load)
    return found
